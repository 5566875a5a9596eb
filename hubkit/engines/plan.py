"""What an engine is given and what it must offer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hubkit.artifact.folder import AdapterFolder, quantized_for
from hubkit.documents.mix import Tree
from hubkit.errors import nearest

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.files.shards import Shards
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.mix import Mix


@dataclass(frozen=True)
class Member:
    """One adapter or mix of a deployment.

    Args:
        name: in the recipe.
        folder: the artifact.
        weight: in the recipe's mix.
        tree: of a mix: how its adapters act together.
        adapters: of a mix: those adapters by their names in the tree, which no other member has.
    """

    name: str
    folder: AdapterFolder
    weight: float
    tree: Tree | None = None
    adapters: Mapping[str, AdapterFolder] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A lock whose files lie here, all of them verified.

    Args:
        base: folder of the base.
        base_files: the files of it that the lock names.
        members: in the order of the mix.
        mix: ``sum`` or ``stack``.
        settings: what the recipe says of this engine, ``[targets.NAME]``.
        base_digest: of the list of those files.
        made: what was worked out to see whether an engine can run the plan, for when it writes it.
        folder: of the lock: paths in its settings are relative to it.
    """

    base: Path
    base_files: Sequence[str]
    members: Sequence[Member]
    mix: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    base_digest: str = ""
    made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    folder: Path = Path()

    @property
    def codec(self) -> str | None:
        """How the base is quantized for adapters that were trained so, and with them for all; None where it is not."""
        return quantized_for(self.folders().values())[0]

    @property
    def compute_dtype(self) -> str | None:
        """What that base is decoded to; None: the dtype of its files."""
        return quantized_for(self.folders().values())[1]

    def folders(self) -> Mapping[str, AdapterFolder]:
        """Every adapter, those in mixes too, by name."""
        found: dict[str, AdapterFolder] = {}
        for member in self.members:
            found |= {member.name: member.folder} if member.tree is None else member.adapters
        return found

    def whole(self) -> Mix:
        """The mix of all members, as one tree of adapters."""
        from hubkit.tensors.parts.mix import from_tree, make_mix

        return make_mix(self.mix, [(from_tree(m.tree or m.name), m.weight) for m in self.members])

    def adapters(self, base: Base | None = None, dtype: str | None = None) -> Mapping[str, Adapter]:
        """The adapters in memory at the sites of the base.

        Args:
            base: its sites; read from its headers when None.
            dtype: see `hubkit.methods.reading.read_adapter`; None: as stored.

        Raises:
            HubkitError: ``HK-METHOD-UNKNOWN``, ``HK-KEYS``, ``HK-SHAPE``, ``HK-NAN``.
        """
        from hubkit.methods.reading import read_adapter
        from hubkit.tensors.base.base import Base

        base = base or Base.from_folder(self.base)
        return {name: read_adapter(folder, base, name=name, dtype=dtype) for name, folder in self.folders().items()}

    def trained_on(self) -> tuple[Shards, Base]:
        """The weights that the adapters were trained beside, decoded where these were quantized, and their sites."""
        from hubkit.tensors.weights.decoding import trained_on

        return trained_on(self.base, self.codec, self.compute_dtype)


class Engine(Protocol):
    """One runtime.

    Args:
        name: as people call it.
        summary: what a deployment for it is, in a few words.
        version: of the runtime, from which this was read.
        proven: whether deployments for it were run here, by that version; else they say that they were not.
        keys: what a recipe's ``[targets.NAME]`` may set.
    """

    name: str
    summary: str
    version: str
    proven: bool
    keys: frozenset[str]

    def refusals(self, plan: Plan) -> list[str]:
        """Why this engine cannot run the plan exactly, one reason a line; empty when it can. Writes nothing."""
        ...

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        """Write the engine's files into the empty folder `out`; the command that runs it, relative to `out`."""
        ...


def unknown_settings(engine: Engine, settings: Mapping[str, Any]) -> list[str]:
    """What a recipe sets that the engine does not know, with the nearest name; a line each."""
    strange = [key for key in settings if key not in engine.keys]
    return [
        f"targets.{engine.name}.{key}: unknown; "
        + (f"did you mean {near[0]!r}?" if (near := nearest(key, engine.keys, 1)) else _known(engine))
        for key in strange
    ]


def encoder_decoder(plan: Plan) -> list[str]:
    """A reason for every engine: what is written for one, its runner too, is for decoders."""
    from hubkit.tensors.base.base import Base

    reason = "the base is an encoder-decoder, which no deployment runs"
    return [reason] if Base.from_folder(plan.base).encodes else []


def _known(engine: Engine) -> str:
    return f"known: {', '.join(sorted(engine.keys)) or 'nothing'}"


def not_adapters(plan: Plan, mixes: bool = False) -> list[str]:
    """Members that are no adapters with tensors of their own, or that add tokens: no engine here runs those.

    Args:
        mixes: the engine takes mixes all the same.
    """
    reasons = [
        f"{m.name}: it is a {m.folder.manifest.kind}, not an adapter"
        for m in plan.members
        if m.folder.manifest.kind != "adapter" and not (mixes and m.tree is not None)
    ]
    return reasons + [
        f"{m.name}: it adds tokens to the vocabulary" for m in plan.members if m.folder.manifest.vocabulary
    ]


def unknown_codec(plan: Plan) -> list[str]:
    """Why the weights that adapters were trained beside cannot be made again; empty where they can."""
    from hubkit.tensors.fourbit.nf4 import CODEC

    known = plan.codec in (None, CODEC)
    return [] if known else [f"the base has to be quantized as {plan.codec}, which is not known here"]


def write_base(plan: Plan, out: Path) -> None:
    """The base that the adapters were trained beside, in folder `out`: its own files, or its decoded weights."""
    copy_base(plan, out, weights=plan.codec is None)
    if plan.codec is not None:
        # adapters of a quantized base saw its decoded weights; these are written, so that the engine computes with them
        from hubkit.tensors.weights.decoding import write_decoded

        write_decoded(plan.base, out, plan.codec, plan.compute_dtype)


def copy_base(plan: Plan, out: Path, *, weights: bool = True) -> None:
    """Copy the base's files, or those beside its weights, into folder `out`, writable."""
    for name in plan.base_files:
        if weights or not name.endswith((".safetensors", ".safetensors.index.json")):
            copy(plan.base / name, out / name)


def copy(source: Path, target: Path) -> None:
    """Copy one file, without the read-only mode of the store."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def write_runner(out: Path) -> tuple[str, ...]:
    """Put the program that answers prompts into a deployment: ``run.py`` of this package, word for word."""
    (out / "run.py").write_bytes((Path(__file__).parent / "run.py").read_bytes())
    return ("python", "run.py")
