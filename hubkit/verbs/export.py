"""`export`: an adapter in another tool's form, in a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.added_tokens import BESIDE
from hubkit.artifact.folder import AdapterFolder, open_adapter, staged
from hubkit.artifact.identity.base_tokenizer import TOKENIZER
from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import adapter_source
from hubkit.named.terms import Term, require_adapter, require_base
from hubkit.named.where import Where
from hubkit.registry.api import Progress

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base

FORMS = ("peft", "adapterhub")


@dataclass(frozen=True, repr=False)
class Exported(Shown):
    """An exported adapter.

    Args:
        path: the folder written.
        to: its form.
        files: what it holds.
        digest: identity of the adapter it was made from.
    """

    path: Path
    to: str
    files: tuple[str, ...]
    digest: str


@checked
def export(
    reference: Path | str,
    out: Path | str,
    *,
    to: str = "peft",
    base: Path | str | None = None,
    revision: str | None = None,
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
            them the tokenizer's files, where the adapter adds tokens.
        base: folder or repository of the base; needed where it lies in 4 bits.
        revision: of the base.
        replace: replace what an earlier export left at `out`.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER`` for a merged checkpoint; ``HK-EXPORT`` when the method has no such form;
            ``HK-EXISTS``; ``HK-BASE-NEEDED``, ``HK-BASE-MISMATCH``; what pulling and reading raise.
    """
    from hubkit.methods.reading import read_adapter

    if to not in FORMS:
        raise HubkitError("HK-EXPORT", f"unknown form {to!r}", want=", ".join(FORMS), have=to, status=USAGE)
    out = Path(out)
    where = Where(registry, offline, progress)
    source = adapter_source(reference, where)
    folder = require_adapter(open_adapter(source.path))
    adapter = read_adapter(folder, _sites(folder, reference, base, revision, where))
    files = {**adapter.method.export(adapter, to), **_tokenizer(folder)}
    own = set(files)
    if replace and out.is_dir() and any(p.name not in own for p in out.iterdir()):
        raise HubkitError(
            "HK-EXISTS", f"{out.name!r} holds files that no export wrote", where=str(out), fix="another --out"
        )
    with staged(out, replace=replace) as stage:
        for name, data in files.items():
            (stage / name).write_bytes(data)
    return Exported(out, to, tuple(sorted(files)), folder.manifest.digest)


def _sites(
    folder: AdapterFolder, reference: Path | str, base: Path | str | None, revision: str | None, where: Where
) -> Base:
    """The sites of the adapter's base: as it lists them, or of the base that is named."""
    from hubkit.methods.reading import recorded_base
    from hubkit.named.sources import base_with_record
    from hubkit.tensors.base.base import Base

    if base is None:
        return recorded_base(folder)
    source, record = base_with_record(base, revision, where)
    require_base([Term(folder.manifest.name, str(reference), 1.0, folder)], record, False)
    return Base.from_folder(source.path)


def _tokenizer(folder: AdapterFolder) -> dict[str, bytes]:
    """The tokenizer's files of an adapter that adds tokens: without them nobody could use its rows."""
    listed = {entry.path for entry in folder.manifest.files} if folder.manifest.vocabulary else set()
    return {name: (folder.path / name).read_bytes() for name in (TOKENIZER, *BESIDE) if name in listed}
