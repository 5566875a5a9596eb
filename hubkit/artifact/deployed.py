"""A deployment on disk: sealed when it was written, checked byte for byte, compared with another.

``deployment.json`` lists every file with its digest; ``deployment.sha256`` holds that of ``deployment.json`` itself, in
the form of ``sha256sum``. So one changed byte anywhere in the folder is found, by hubkit or by ``sha256sum -c``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.deployment import DEPLOYMENT_NAME, Deployment
from hubkit.documents.files import refusing
from hubkit.documents.lock import LOCK_NAME, Lock
from hubkit.documents.manifest import FileEntry
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError

SEAL_NAME = "deployment.sha256"


def entries(folder: Path) -> tuple[FileEntry, ...]:
    """Every file in a folder with size and digest."""
    return tuple(FileEntry(name, path.stat().st_size, hash_file(path)) for name, path in _contents(folder).items())


def seal(folder: Path, made: Deployment) -> str:
    """Write ``deployment.json`` and its seal; returns its digest, the identity of all that is in the folder."""
    data = made.to_bytes()
    (folder / DEPLOYMENT_NAME).write_bytes(data)
    (folder / SEAL_NAME).write_bytes(_seal(data))
    return sha256(data)


def digest_of(folder: Path) -> str:
    """The digest of a deployment, of its ``deployment.json`` alone."""
    with refusing(folder):
        return sha256((folder / DEPLOYMENT_NAME).read_bytes())


def check_sealed(folder: Path, digest: str | None = None) -> Deployment:
    """The deployment in `folder`, every byte as it was written; nothing is missing, changed or added.

    Args:
        digest: refuse any but the deployment of this digest.

    Raises:
        HubkitError: ``HK-DEPLOY-DRIFT`` with every difference; what reading raises.
    """
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
    return made


def differences(old: Deployment, new: Deployment) -> Iterator[str]:
    """What another deployment runs otherwise, a line each."""
    for name in ("engine", "version"):
        yield from _changed(name, getattr(old, name), getattr(new, name))
    yield from _changed("base", old.base.weights, new.base.weights)
    for name in sorted({*old.adapters, *new.adapters}):
        yield from _changed(f"adapter {name}", old.adapters.get(name), new.adapters.get(name))
    for name in sorted({*old.settings, *new.settings}):
        yield from _changed(f"setting {name}", old.settings.get(name), new.settings.get(name))
    yield from _changed("command", " ".join(old.command), " ".join(new.command))
    yield from _changed("overrides", ", ".join(old.overrides), ", ".join(new.overrides))
    files, others = ({entry.path: entry.sha256 for entry in one.files} for one in (old, new))
    for path in sorted({*files, *others}):
        yield from _changed(path, files.get(path), others.get(path))


def _changed(name: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if old in (None, ""):
        yield f"{name}: added, {new}"
    elif new in (None, ""):
        yield f"{name}: removed, {old}"
    else:
        yield f"{name}: {old} -> {new}"


def _contents(folder: Path) -> dict[str, Path]:
    """Everything in a folder but folders; a link is something, wherever it leads."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in found}


def _seal(data: bytes) -> bytes:
    return f"{sha256(data).removeprefix('sha256:')}  {DEPLOYMENT_NAME}\n".encode()


def _unsealed(folder: Path, data: bytes) -> list[str]:
    path = folder / SEAL_NAME
    if not path.is_file():
        return [f"{SEAL_NAME}: missing"]
    return [] if path.read_bytes() == _seal(data) else [f"{DEPLOYMENT_NAME}: not what {SEAL_NAME} says"]


def _difference(path: Path | None, entry: FileEntry) -> list[str]:
    if path is None:
        return [f"{entry.path}: missing"]
    if path.is_symlink():
        return [f"{entry.path}: a link"]
    if path.stat().st_size != entry.size:
        return [f"{entry.path}: {path.stat().st_size} bytes, not {entry.size}"]
    have = hash_file(path)
    return [] if have == entry.sha256 else [f"{entry.path}: {have}, not {entry.sha256}"]
