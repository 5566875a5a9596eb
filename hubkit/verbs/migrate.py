"""`migrate`: an adapter whose modules its base calls otherwise now: other release of a library, or another library.

What each is called now is proposed by names, held against shapes, against the base's digests where the adapter lists
those of its own base, and against its probes where it has some. What is not certain is refused, never guessed.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.adopting.adopt import adopt
from hubkit.adopting.migrating import pairs_given, renamed_files
from hubkit.adopting.renaming import Renaming
from hubkit.artifact.folder import (
    CARD_NAME,
    MANIFEST_NAME,
    AdapterFolder,
    check_adapter,
    open_adapter,
    write_adapter,
)
from hubkit.documents.arguments import checked
from hubkit.documents.manifest import Manifest, Parent
from hubkit.documents.probes import PROBES_NAME, Probes
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.named.sources import Source, adapter_source, base_with_record, chosen_name
from hubkit.named.terms import require_adapter
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord


@dataclass(frozen=True, repr=False)
class Migrated(Shown):
    """An adapter under its base's names.

    Args:
        path: its folder.
        digest: its identity; empty after a dry run.
        renamed: which kinds of modules are called otherwise.
        proven: what it was held against: ``shapes``, ``digests``, ``probes``.
        parent: the adapter it was, by its digest; None for one of another tool.
        dry_run: nothing was written.
    """

    path: Path
    digest: str
    renamed: tuple[Renaming, ...]
    proven: tuple[str, ...]
    parent: str | None
    dry_run: bool


@checked
def migrate(
    adapter: Path | str,
    out: Path | str,
    *,
    base: Path | str,
    rename: Sequence[str] = (),
    revision: str | None = None,
    name: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Migrated:
    """Writes an adapter under the names that its base has now.

    Args:
        adapter: a folder or repository: an adapter of hubkit, or a PEFT folder.
        out: folder of the renamed adapter.
        base: folder or repository of the base with its new names.
        rename: ``OLD=NEW``, beginnings of names, done before anything is proposed.
        revision: of the base.
        name: its name; its own by default, the folder's for a PEFT folder.
        replace: replace an adapter that is at `out`.
        dry_run: propose and prove, write nothing.

    Raises:
        HubkitError: ``HK-MIGRATE`` with every kind of module that has no certain place, or whose proof fails;
            ``HK-NOT-ADAPTER``, ``HK-KEYS``, ``HK-SHAPE``, ``HK-TARGET``, ``HK-EXISTS``, ``HK-OPTIONS``; what pulling
            and reading raise.
    """
    given, out, where = pairs_given(rename), Path(out), Where(registry, offline, progress)
    source = adapter_source(adapter, where)
    own = _own(source)
    target, record = base_with_record(base, revision, where)
    title = name or (own.manifest.name if own is not None else chosen_name(None, source.path))
    before = own.base_tensors() if own is not None else None
    found = renamed_files(source.path, target.path, record.tensors, before, given)
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "adapter"
        folder.mkdir()
        for path, data in found.files.items():
            (folder / path).write_bytes(data)
        _tokenizer(own, source.path, folder)
        made = adopt(folder, title, str(target.path), None, where, allow_base_mismatch=True)
    proven = ["shapes", *(["digests"] if before and all(one.sha256 for one in before) else [])]
    draft = _manifest(made.manifest, record, own, source.reference)
    files = {**made.files, **({PROBES_NAME: own.path / PROBES_NAME} if own is not None and _probed(own) else {})}
    check_adapter(out, draft, files, replace=replace)
    if PROBES_NAME in files:
        _require_alike(draft, files, target.path, where)
        proven.append("probes")
    kinds = {one.old: one.new for one in found.renamed}
    manifest = dataclasses.replace(draft, migration={"renamed": kinds, "proven": proven})
    files[CARD_NAME] = _card(source.path, manifest, files)
    parent = own.manifest.digest if own is not None else None
    digest = "" if dry_run else write_adapter(out, manifest, files, replace=replace).digest
    return Migrated(out, digest, tuple(found.renamed), tuple(proven), parent, dry_run)


def _own(source: Source) -> AdapterFolder | None:
    """The adapter where it is one of ours; None for another tool's."""
    if not (source.path / MANIFEST_NAME).is_file():
        return None
    return require_adapter(open_adapter(source.path))


def _probed(folder: AdapterFolder) -> bool:
    return PROBES_NAME in {entry.path for entry in folder.manifest.files}


def _tokenizer(own: AdapterFolder | None, source: Path, folder: Path) -> None:
    """Puts the tokenizer's files of an adapter that adds tokens beside its others."""
    from hubkit.artifact.added_tokens import BESIDE
    from hubkit.artifact.identity.base_tokenizer import TOKENIZER

    for name in (TOKENIZER, *BESIDE):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def _manifest(made: Manifest, record: BaseRecord, own: AdapterFolder | None, reference: str) -> Manifest:
    """The manifest of the renamed adapter: what was known of it goes on."""
    if own is None or made.base is None or own.manifest.base is None:
        return dataclasses.replace(made, overrides=())
    old, before = own.manifest, own.manifest.base
    base = dataclasses.replace(record.fingerprint, codec=before.codec, compute_dtype=before.compute_dtype)
    return dataclasses.replace(
        made,
        base=base,
        version=old.version,
        license=old.license,
        training=old.training,
        overrides=old.overrides,
        parents=(Parent(reference, old.digest, 1.0),),
    )


def _require_alike(draft: Manifest, files: dict[str, Any], base: Path, where: Where) -> None:
    """Refuses a renaming under which the base does not say what the adapter's probes say: ``HK-MIGRATE``."""
    from hubkit.named.replaying import F32, replayed
    from hubkit.named.terms import open_sources

    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / draft.name
        write_adapter(folder, draft, {**files, CARD_NAME: b""})
        members = open_sources([(Source(folder, draft.name), 1.0)], where)
        try:
            replayed(members, base, Probes.read(folder), F32)
        except HubkitError as error:
            if error.code not in ("HK-NOOP", "HK-SCALE") and not error.code.startswith("HK-PROBE-"):
                raise
            what = "under its new names the adapter does not say what its probes say"
            have = [f"{error.code}: {error.what}", *error.have]
            raise HubkitError("HK-MIGRATE", what, where=str(base), want=error.want, have=have) from error


def _card(source: Path, manifest: Manifest, files: dict[str, Any]) -> bytes:
    from hubkit.artifact.card import card_file

    card = source / CARD_NAME
    return card_file(manifest, files, card.read_bytes().decode(errors="replace") if card.is_file() else None)
