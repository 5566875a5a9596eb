"""`bundle`: everything that a lock names in one file, the same bytes wherever it is made; `sync` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubkit.artifact.folder import AdapterFolder
from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.arguments import checked
from hubkit.documents.lock import LOCK_NAME, Lock
from hubkit.documents.shown import Shown
from hubkit.locking.bundling import gathered, named
from hubkit.named.locked import find_adapter, find_base
from hubkit.named.members import open_mix
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.registry.store.archive import write_archive


@dataclass(frozen=True, repr=False)
class Bundled(Shown):
    """A bundle that was written.

    Args:
        path: the file.
        digest: of its bytes.
        size: of the file, in bytes.
        lock: digest of the lock whose artifacts it holds.
        artifacts: the folders in it: one for each adapter and mix, and ``base`` where that was asked for.
        licenses: folder -> SPDX identifier, where its manifest names one.
    """

    path: Path
    digest: str
    size: int
    lock: str
    artifacts: tuple[str, ...]
    licenses: dict[str, str]


@checked
def bundle(
    lock: Path | str = LOCK_NAME,
    *,
    out: Path | str,
    base: bool = False,
    replace: bool = False,
    registry: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Bundled:
    """Write what a lock names into one file.

    An uncompressed tar archive with nothing of time, owner or place in it: ``bundle.json``, which lists every file with
    its digest, ``hubkit.lock``, and a folder for each adapter and mix, those in mixes too.

    Args:
        lock: the lock or its folder.
        out: the file.
        base: put the base in, too.
        replace: overwrite a file that is there.
        registry: for references that name none, if not the default registry.
        offline: fetch nothing: everything has to be here.
        progress: of each pull.

    Raises:
        HubkitError: ``HK-LOCK-MISSING``, ``HK-LOCK-DRIFT``; ``HK-EXISTS``; what reading the lock, pulling and writing
            raise.
    """
    path, out = Path(lock), Path(out)
    pinned, folder = Lock.read(path), path if path.is_dir() else path.parent
    where = Where(registry, offline, progress)
    adapters: list[tuple[str, AdapterFolder]] = []
    for one in pinned.adapters:
        adapter, found = find_adapter(one, folder, where)
        adapters.append((one.name, adapter))
        if adapter.manifest.kind == "mix":
            mix = open_mix(adapter, found.reference, where)
            inside = [*mix.mixes, *(inner.folder for inner in mix.adapters)]
            adapters += [(inner.manifest.name, inner) for inner in inside]
    bottom = find_base(pinned.base, folder, where) if base else None
    contents = gathered(pinned, named(adapters), bottom)
    write_archive(out, contents.bundle, contents.lock, contents.sources, replace=replace)
    artifacts = contents.bundle.artifacts
    return Bundled(
        path=out,
        digest=hash_file(out),
        size=out.stat().st_size,
        lock=pinned.digest,
        artifacts=tuple(one.folder for one in artifacts),
        licenses={one.folder: one.license for one in artifacts if one.license},
    )
