"""`export`: an adapter in another tool's form, in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.added_tokens import BESIDE
from hubkit.artifact.folder import CARD_NAME, AdapterFolder, open_adapter, quantized_for, staged
from hubkit.artifact.identity.base_tokenizer import TOKENIZER
from hubkit.artifact.task_types import LABELS_NAME, labels_file, peft_card
from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import adapter_source
from hubkit.named.terms import Term, require_adapter, require_base
from hubkit.registry.address import is_repo
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter

FORMS = ("peft", "adapterhub")
"""Forms of libraries that train, which say what the method is; those of engines that serve: `hubkit.engines.FORMS`."""


@dataclass(frozen=True, repr=False)
class Exported(Shown):
    """An exported adapter.

    Args:
        path: the folder written.
        to: its form.
        files: what it holds.
        digest: identity of the adapter it was made from.
        said: what was done to it, a line each.
    """

    path: Path
    to: str
    files: tuple[str, ...]
    digest: str
    said: tuple[str, ...] = ()


@checked
def export(
    reference: Path | str,
    out: Path | str,
    *,
    to: str = "peft",
    base: Path | str | None = None,
    revision: str | None = None,
    rank: int | None = None,
    budget: float | None = None,
    settings: Mapping[str, Any] | None = None,
    registry: str | None = None,
    offline: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Writes an adapter in another tool's form.

    Args:
        reference: folder or repository of the adapter.
        out: folder to write.
        to: ``peft``: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads and writes them;
            ``adapterhub``: ``adapter_config.json`` and ``adapter.safetensors`` as the adapters library does. Beside
            them the tokenizer's files, where the adapter adds tokens, and the names of labels, where it has some.
            ``vllm``, ``sglang``, ``mlx``, ``gguf``: as that engine reads it, a plain LoRA of one rank and scale 1
            (`hubkit.engines.lowered`).
        base: folder or repository of the base; needed where it lies in 4 bits, for experts of a mixture,
            for a model of several parts: its model's names are PEFT's; for DoRA and for gguf in an engine's form.
        revision: of the base.
        rank: the largest rank that an engine takes.
        budget: the part of a module's change that may be left out where it is not low-rank.
        settings: of that engine's form, as a recipe's ``[targets.NAME]`` has them: ``{"adapter_dtype": "float16"}``.
        replace: replace what an earlier export left at `out`.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER`` for a merged checkpoint; ``HK-EXPORT`` when the method has no such form;
            ``HK-LOWER`` when no plain LoRA says what the adapter does; ``HK-EXISTS``; ``HK-BASE-NEEDED``,
            ``HK-BASE-MISMATCH``; what pulling and reading raise.
    """
    from hubkit.engines import FORMS as SERVED

    if to not in (*FORMS, *SERVED):
        want = ", ".join((*FORMS, *SERVED))
        raise HubkitError("HK-EXPORT", f"unknown form {to!r}", want=want, have=to, status=USAGE)
    out = Path(out)
    where = Where(registry, offline, progress)
    source = adapter_source(reference, where)
    folder = require_adapter(open_adapter(source.path))
    place, sites = _base(folder, reference, base, revision, where)
    if to in SERVED and sites.encodes:
        what, fix = f"the form {to!r} has no encoder-decoders", "--to peft; or hubkit merge, for a checkpoint"
        raise HubkitError("HK-EXPORT", what, where=str(reference), want="an adapter of a decoder", fix=fix)
    if to in SERVED:
        files, said = _served(folder, to, place, sites, rank, budget, settings or {})
    else:
        _require_none(to, {"rank": rank, "budget": budget, "settings": settings or None})
        files, said = _foreign(folder, to, place, sites), ()
    own = set(files)
    if replace and out.is_dir() and any(p.name not in own for p in out.iterdir()):
        raise HubkitError(
            "HK-EXISTS", f"{out.name!r} holds files that no export wrote", where=str(out), fix="another --out"
        )
    with staged(out, replace=replace) as stage:
        for name, data in files.items():
            (stage / name).write_bytes(data)
    return Exported(out, to, tuple(sorted(files)), folder.manifest.digest, said)


def _foreign(folder: AdapterFolder, to: str, place: Path | None, sites: Base) -> Mapping[str, bytes]:
    """The files of another library's form."""
    from hubkit.adopting.live_names import for_peft, live_names
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.parts.heads import of_document, with_made

    task = folder.manifest.task or {}
    adapter = read_adapter(folder, with_made(sites, *of_document(task)))
    files = {**adapter.method.export(adapter, to), **_tokenizer(folder)}
    if to == "peft" and task.get("labels"):
        files |= {LABELS_NAME: labels_file(list(map(str, task["labels"])))}
        files |= {CARD_NAME: peft_card(adapter.name, task, adapter.source if is_repo(adapter.source or "") else None)}
    form = adapter.method.peft_form
    if to == "peft" and form is not None and (place is not None or _renamed(adapter)):
        files = for_peft(files, form, live_names(_needed(place, folder)))
    return files


def _served(
    folder: AdapterFolder,
    to: str,
    place: Path | None,
    sites: Base,
    rank: int | None,
    budget: float | None,
    settings: Mapping[str, Any],
) -> tuple[Mapping[str, bytes], tuple[str, ...]]:
    """The files of an engine's form, and what was done to get there."""
    from hubkit.engines import form_named
    from hubkit.engines.lowered import lower
    from hubkit.engines.served import Served
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.weights.decoding import trained_on

    if place is not None:
        _, sites = trained_on(place, *quantized_for([folder]))
    name = folder.manifest.name
    adapter = read_adapter(folder, sites, name=name, dtype="master")
    lowered = lower(name, name, {name: adapter}, sites, rank=rank, budget=budget)
    return form_named(to)(Served(name, folder.manifest.digest, lowered), place, settings), lowered.said


def _require_none(to: str, options: Mapping[str, object]) -> None:
    """Refuses options that a form does not have: ``HK-OPTIONS``."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        what = f"the form {to!r} is written as the adapter is: nothing can be set"
        raise HubkitError("HK-OPTIONS", what, have=given, fix=f"leave out --{given[0]}", status=USAGE)


def _base(
    folder: AdapterFolder, reference: Path | str, base: Path | str | None, revision: str | None, where: Where
) -> tuple[Path | None, Base]:
    """The folder of the base that is named, and its sites; without one, the sites that the adapter lists."""
    from hubkit.methods.reading import recorded_base
    from hubkit.named.sources import base_with_record
    from hubkit.tensors.base.base import Base

    if base is None:
        return None, recorded_base(folder)
    source, record = base_with_record(base, revision, where)
    require_base([Term(folder.manifest.name, str(reference), 1.0, folder)], record, False)
    return source.path, Base.from_folder(source.path)


def _renamed(adapter: Adapter) -> bool:
    """Whether a model may name the adapter's modules as its files do not: experts, a model of several parts."""
    from hubkit.tensors.experts.expert import is_expert

    base = adapter.base
    return any(map(is_expert, adapter.parts)) or any(base.arch.tower(name) for name in base.sites)


def _needed(base: Path | None, folder: AdapterFolder) -> Path:
    """The base's folder, without which nobody knows how a model names its modules: ``HK-BASE-NEEDED``."""
    if base is None:
        what = "PEFT names modules as the model holds them, which only the base itself says"
        where, have = str(folder.path), "experts, or a model of several parts"
        raise HubkitError("HK-BASE-NEEDED", what, where=where, have=have, fix="name the base's folder with --base")
    return base


def _tokenizer(folder: AdapterFolder) -> dict[str, bytes]:
    """The tokenizer's files of an adapter that adds tokens: without them nobody could use its rows."""
    listed = {entry.path for entry in folder.manifest.files} if folder.manifest.vocabulary else set()
    return {name: (folder.path / name).read_bytes() for name in (TOKENIZER, *BESIDE) if name in listed}
