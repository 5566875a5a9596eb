"""`deploy`: make a lock runnable for one engine, in one folder that holds everything; and check that it stayed so.

What is written is exactly what the lock names: every file of base and adapters is hashed before it is used. Beside
``deployment.json``, which lists every file written, lies ``deployment.sha256`` in the form of ``sha256sum``: one
changed byte anywhere in the folder is found by `check`, and by ``sha256sum -c`` for ``deployment.json`` itself.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import open_adapter
from hubkit.artifact.identity.digest import hash_file
from hubkit.artifact.staging import staged
from hubkit.documents.arguments import checked
from hubkit.documents.deployment import DEPLOYMENT_NAME, Deployment
from hubkit.documents.files import refusing
from hubkit.documents.lock import LOCK_NAME, Lock, LockedAdapter, LockedFile
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry
from hubkit.documents.schema import sha256
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.members import open_mix
from hubkit.named.sources import adapter_source, base_source
from hubkit.named.where import Where
from hubkit.registry.api import Progress
from hubkit.registry.reference import Reference, parse_reference
from hubkit.verbs.lock import at

if TYPE_CHECKING:
    from hubkit.engines import Plan

SEAL_NAME = "deployment.sha256"


@dataclass(frozen=True, repr=False)
class Deployed(Shown):
    """A deployment that was written, or that passed the check.

    Args:
        path: its folder.
        engine: what runs it.
        digest: sha256 of ``deployment.json``: the identity of everything in the folder.
        lock: digest of the lock it was made from.
        command: what to run in the folder.
        files: how many files it has beside ``deployment.json``.
        size: their bytes.
        checked: it was there already, and every byte is as it was written.
        dry_run: nothing was written.
    """

    path: Path
    engine: str
    digest: str | None
    lock: str
    command: tuple[str, ...]
    files: int
    size: int
    checked: bool
    dry_run: bool


@checked
def deploy(
    folder: Path | str,
    *,
    engine: str | None = None,
    lock: Path | str = LOCK_NAME,
    check: bool = False,
    digest: str | None = None,
    replace: bool = False,
    registry: str | None = None,
    offline: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Deployed:
    """Write a deployment, or check one.

    Args:
        folder: the deployment.
        engine: ``peft``, ``merged``, ...; needed unless `check`.
        lock: the lock to make runnable; folders named in it are relative to it.
        check: write nothing; refuse when one byte in the folder is not what was written.
        digest: with `check`, also refuse any deployment but the one of this digest.
        replace: exchange a deployment that is there.
        registry: for references that name none, if not the default registry.
        offline: use only what was pulled before.
        dry_run: fetch and prove everything, write nothing.
        progress: of each pull.

    Raises:
        HubkitError: ``HK-DEPLOY-DRIFT`` with every difference (check); ``HK-ENGINE`` with every reason why the engine
            cannot run the lock exactly; ``HK-ENGINE-UNKNOWN``; ``HK-LOCK-DRIFT`` when what is found is not what was
            locked; ``HK-EXISTS``; what reading and pulling raise.
    """
    folder = Path(folder)
    if check:
        return _check(folder, digest)
    from hubkit.engines import ENGINES, engine_named

    if engine is None:
        raise HubkitError("HK-USAGE", "deploy needs an engine", want=", ".join(ENGINES), fix="--engine", status=USAGE)
    chosen, path = engine_named(engine), Path(lock)
    pinned = Lock.read(path)
    plan = _plan(pinned, path if path.is_dir() else path.parent, Where(registry, offline, progress))
    reasons = chosen.refusals(plan)
    if reasons:
        what = f"the engine {engine!r} cannot run this lock exactly"
        raise HubkitError("HK-ENGINE", what, where=str(path), have=reasons, fix="choose another --engine")
    if dry_run:
        return Deployed(folder, engine, None, pinned.digest, (), 0, 0, False, True)
    _require_own(folder, replace)
    with staged(folder, replace=replace) as stage:
        command = chosen.write(plan, stage)
        (stage / LOCK_NAME).write_bytes(pinned.to_bytes())
        files = _entries(stage)
        made = _deployment(engine, pinned, files, command)
        data = made.to_bytes()
        (stage / DEPLOYMENT_NAME).write_bytes(data)
        (stage / SEAL_NAME).write_bytes(_seal(data))
    size = sum(entry.size for entry in files)
    return Deployed(folder, engine, sha256(data), pinned.digest, command, len(files), size, False, False)


def _plan(pinned: Lock, folder: Path, where: Where) -> Plan:
    """Bring everything that is locked here and hash it."""
    from hubkit.engines import Member, Plan

    base = _base_folder(pinned, folder, where)
    _require_locked("base", pinned.base.source, base, pinned.base.files)
    members: list[Member] = []
    for one in pinned.adapters:
        reference = _adapter_reference(one, folder)
        source = adapter_source(str(reference), where)
        adapter = open_adapter(source.path)
        if adapter.manifest.digest != one.digest:
            raise _drift(one.name, one.source, [f"{MANIFEST_NAME}: {adapter.manifest.digest}, not {one.digest}"])
        member = Member(one.name, adapter, one.weight)
        if adapter.manifest.kind == "mix":
            taken = {name for known in members for name in known.adapters} | {known.name for known in pinned.adapters}
            mix = open_mix(adapter, reference, where, taken=taken)
            inside = {found.name: found.folder for found in mix.adapters}
            member = dataclasses.replace(member, tree=mix.tree, adapters=inside)
        members.append(member)
    return Plan(base, tuple(file.path for file in pinned.base.files), tuple(members), pinned.mix)


def _base_folder(pinned: Lock, folder: Path, where: Where) -> Path:
    if pinned.base.revision is None:
        return folder / pinned.base.source
    reference = _pinned(parse_reference(pinned.base.source), pinned.base.revision)
    return base_source(str(reference), None, where).path


def _adapter_reference(one: LockedAdapter, folder: Path) -> Reference:
    reference = at(folder, parse_reference(one.source))
    return _pinned(reference, one.revision) if reference.path is None else reference


def _pinned(reference: Reference, commit: str | None) -> Reference:
    return dataclasses.replace(reference, revision=commit)


def _require_locked(name: str, source: str, folder: Path, files: tuple[LockedFile, ...]) -> None:
    wrong = []
    for entry in files:
        path = folder / entry.path
        have = hash_file(path) if path.is_file() else "missing"
        if have != entry.sha256:
            wrong.append(f"{entry.path}: {have}, not {entry.sha256}")
    if wrong:
        raise _drift(name, source, wrong)


def _drift(name: str, source: str, have: list[str]) -> HubkitError:
    what, fix = f"{name!r} is not what was locked", "hubkit lock, after making sure that the change is wanted"
    return HubkitError("HK-LOCK-DRIFT", what, where=source, have=have, fix=fix)


def _require_own(folder: Path, replace: bool) -> None:
    """Never let `replace` remove a folder that is no deployment."""
    if replace and folder.is_dir() and any(folder.iterdir()) and not (folder / DEPLOYMENT_NAME).is_file():
        what, fix = f"{folder.name!r} holds files but no deployment", "choose another folder"
        raise HubkitError("HK-EXISTS", what, where=str(folder), fix=fix)


def _deployment(engine: str, pinned: Lock, files: tuple[FileEntry, ...], command: tuple[str, ...]) -> Deployment:
    return Deployment(
        engine=engine,
        lock=pinned.digest,
        base=pinned.base.fingerprint,
        adapters={one.name: one.digest for one in pinned.adapters},
        files=files,
        command=command,
        overrides=pinned.overrides,
    )


def _entries(folder: Path) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(name, path.stat().st_size, hash_file(path)) for name, path in _contents(folder).items())


def _contents(folder: Path) -> dict[str, Path]:
    """Everything in a folder but folders; a link is something, wherever it leads."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in found}


def _seal(data: bytes) -> bytes:
    return f"{sha256(data).removeprefix('sha256:')}  {DEPLOYMENT_NAME}\n".encode()


def _check(folder: Path, digest: str | None) -> Deployed:
    """Every byte in the folder against what was written; nothing may be missing, changed or added."""
    made = Deployment.read(folder)
    data = (folder / DEPLOYMENT_NAME).read_bytes()
    wrong = _unsealed(folder, data)
    if digest is not None and digest != sha256(data):
        wrong.append(f"{DEPLOYMENT_NAME}: {sha256(data)}, not {digest}")
    listed = {entry.path: entry for entry in made.files}
    with refusing(folder):
        found = _contents(folder)
        for name, entry in listed.items():
            wrong += _difference(found.get(name), entry)
    wrong += [f"{name}: added" for name in found if name not in {*listed, DEPLOYMENT_NAME, SEAL_NAME}]
    if not wrong and Lock.read(folder).digest != made.lock:
        wrong.append(f"{LOCK_NAME}: not the lock that {DEPLOYMENT_NAME} names")
    if wrong:
        what, fix = "the deployment is not what was deployed", "deploy it again from its lock"
        raise HubkitError("HK-DEPLOY-DRIFT", what, where=str(folder), have=wrong, fix=fix)
    size = sum(entry.size for entry in made.files)
    return Deployed(folder, made.engine, sha256(data), made.lock, made.command, len(listed), size, True, False)


def _unsealed(folder: Path, data: bytes) -> list[str]:
    seal = folder / SEAL_NAME
    if not seal.is_file():
        return [f"{SEAL_NAME}: missing"]
    return [] if seal.read_bytes() == _seal(data) else [f"{DEPLOYMENT_NAME}: not what {SEAL_NAME} says"]


def _difference(path: Path | None, entry: FileEntry) -> list[str]:
    if path is None:
        return [f"{entry.path}: missing"]
    if path.is_symlink():
        return [f"{entry.path}: a link"]
    if path.stat().st_size != entry.size:
        return [f"{entry.path}: {path.stat().st_size} bytes, not {entry.size}"]
    have = hash_file(path)
    return [] if have == entry.sha256 else [f"{entry.path}: {have}, not {entry.sha256}"]
