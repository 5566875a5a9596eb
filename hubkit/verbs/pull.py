"""`pull`: bring an adapter or a base into the local store, verified, and say where it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubkit.artifact.folder import open_adapter
from hubkit.documents.arguments import checked
from hubkit.documents.manifest import MANIFEST_NAME, Manifest
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.members import MixAdapter, open_mix
from hubkit.named.sources import Source, adapter_source, base_reference, base_source, read_manifest
from hubkit.registry.address import is_repo
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.registry.reference import parse_reference


@dataclass(frozen=True, repr=False)
class Pulled(Shown):
    """What was pulled.

    Args:
        reference: the repository at its commit: what to write to get these very bytes again.
        path: the read-only folder in the store.
        commit: 40 hex digits.
        digest: of an adapter the sha256 of its ``hubkit.json``, else of the list of its files.
        revision: the branch or tag that led to the commit.
        size: bytes of all files.
        fetched: bytes that were downloaded now; 0 when everything was there.
        members: of a mix: its adapters, which were pulled with it.
    """

    reference: str
    path: Path
    commit: str
    digest: str
    revision: str | None
    size: int
    fetched: int
    members: tuple[str, ...] = ()


@checked
def pull(
    reference: Path | str,
    *,
    base: bool = False,
    registry: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    allow_moved: bool = False,
) -> Pulled:
    """Bring what `reference` names into the store.

    Args:
        reference: a repository, at a revision or not; with `base` one that holds a model or an adapter.
        base: pull a base model (configuration, tokenizer, safetensors): this one, or the one this adapter was made on.
        registry: where, if not the default registry.
        offline: only what was pulled before.
        progress: called with (bytes so far, bytes in all).
        allow_moved: take a tag although it meant another commit when it was last pulled here.

    Raises:
        HubkitError: ``HK-REFERENCE``; every refusal of `hubkit.registry.store.store.Store.pull`; nothing is left then.
            ``HK-MIX-MEMBER`` for a member of a mix that cannot be had or is another than the one that was mixed.
            ``HK-MOVED`` for a tag that meant another commit when it was last pulled.
    """
    where = Where(registry, offline, progress, allow_moved)
    if base and not offline:
        reference = _base_of(reference, where)
    found = base_source(reference, None, where) if base else adapter_source(reference, where)
    if found.stored is None:
        what = "this is a folder, there is nothing to pull"
        raise HubkitError("HK-REFERENCE", what, want="org/name", have=str(reference), status=USAGE)
    members = () if base else _members(found, where)
    return Pulled(
        reference=found.reference,
        path=found.path,
        commit=found.stored.commit,
        digest=found.stored.digest,
        revision=found.stored.revision,
        size=sum(file.size for file in found.stored.files) + sum(one.size for one in members),
        fetched=found.stored.fetched + sum(one.fetched for one in members),
        members=tuple(one.reference for one in members),
    )


def _members(found: Source, where: Where) -> tuple[MixAdapter, ...]:
    """The adapters of a mix, pulled; nothing for what is no mix."""
    if not (found.path / MANIFEST_NAME).is_file() or Manifest.read(found.path).kind != "mix":
        return ()
    return open_mix(open_adapter(found.path), parse_reference(found.reference), where).adapters


def _base_of(text: Path | str, where: Where) -> Path | str:
    """The base an adapter names, with its commit; `text` itself when that is no adapter of hubkit's."""
    reference = base_reference(text)
    try:
        manifest = read_manifest(reference, where)
    except HubkitError as error:
        if error.code not in ("HK-NOT-FOUND", "HK-NOT-ADAPTER"):
            raise
        return text
    base = manifest.base
    if manifest.kind == "model":
        return text
    if base is None or not base.source or not is_repo(base.source):
        field = f"{reference}  {MANIFEST_NAME}#/base/source"
        have = (base.source if base else None) or "nothing"
        raise HubkitError("HK-BASE-MISSING", "the adapter names no repository of its base", where=field, have=have)
    return f"{base.source}@{base.revision}" if base.revision else base.source
