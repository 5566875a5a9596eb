"""What an engine is given and what it must offer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hubkit.artifact.folder import AdapterFolder, quantized_for
from hubkit.documents.mix import Tree

if TYPE_CHECKING:
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
    """

    base: Path
    base_files: Sequence[str]
    members: Sequence[Member]
    mix: str

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

    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters in memory, as stored, at the sites of the base (headers only).

        Raises:
            HubkitError: ``HK-METHOD-UNKNOWN``, ``HK-KEYS``, ``HK-SHAPE``, ``HK-NAN``.
        """
        from hubkit.methods.reading import read_adapter
        from hubkit.tensors.base.base import Base

        base = Base.from_folder(self.base)
        return {name: read_adapter(folder, base, name=name) for name, folder in self.folders().items()}


class Engine(Protocol):
    """One runtime."""

    name: str
    summary: str

    def refusals(self, plan: Plan) -> list[str]:
        """Why this engine cannot run the plan exactly, one reason a line; empty when it can. Writes nothing."""
        ...

    def write(self, plan: Plan, out: Path) -> tuple[str, ...]:
        """Write the engine's files into the empty folder `out`; the command that runs it, relative to `out`."""
        ...


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
