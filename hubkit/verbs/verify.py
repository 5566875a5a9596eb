"""`verify`: prove that an adapter is whole, that its tensors are what its method makes, and which base it belongs to.

Every byte is hashed again, whatever was hashed before. Where the base cannot be looked at, the answer is "undecided"
(exit status 3), never "yes".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.carried import carried_type
from hubkit.artifact.folder import WEIGHTS_NAME, AdapterFolder, open_adapter
from hubkit.documents.arguments import checked
from hubkit.documents.files import refusing
from hubkit.documents.manifest import MANIFEST_NAME, BaseFingerprint
from hubkit.documents.names import check_allowed, check_names
from hubkit.documents.shown import Shown
from hubkit.errors import UNDECIDED, HubkitError
from hubkit.named.members import OpenedMix, open_mix
from hubkit.named.sources import adapter_source, base_record, base_reference
from hubkit.named.where import Where
from hubkit.registry.api import Progress
from hubkit.registry.reference import parse_reference

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord

UNREACHABLE = ("HK-OFFLINE", "HK-AUTH", "HK-FORBIDDEN", "HK-NOT-FOUND", "HK-NO-REVISION", "HK-BASE-MISSING")


@dataclass(frozen=True)
class Check:
    """One thing that was proven: its name and, for people, what exactly."""

    name: str
    detail: str


@dataclass(frozen=True, repr=False)
class Verified(Shown):
    """An adapter that passed everything.

    Args:
        reference: the folder as given, or the repository at its commit.
        path: the folder.
        digest: the adapter's identity.
        base: what it was compared with.
        checks: what was proven, in order.
        unlisted: files beside it that the manifest does not vouch for.
        overrides: named overrides used: here, or when it was made.
    """

    reference: str
    path: Path
    digest: str
    base: str
    checks: tuple[Check, ...]
    unlisted: tuple[str, ...]
    overrides: tuple[str, ...]


@checked
def verify(
    reference: Path | str,
    *,
    base: Path | str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Prove an adapter.

    Args:
        reference: a folder, or a repository that is pulled.
        base: folder or repository of the base; by default the one its manifest names.
        registry: where, if not the default registry.
        offline: use only what was pulled before; the base must then be a folder.
        allow_base_mismatch: go on with another base; recorded in the result.
        progress: of the pull.

    Raises:
        HubkitError: what opening raises; ``HK-FILES`` with every difference; ``HK-NAME``, ``HK-PICKLE``,
            ``HK-FORBIDDEN-FILE``, ``HK-SAFETENSORS``; ``HK-KEYS``, ``HK-SHAPE``, ``HK-NAN``; ``HK-BASE-MISMATCH``;
            ``HK-MIX-MEMBER`` for a member of a mix; with status 3 ``HK-BASE-UNPROVEN`` where the base cannot be looked
            at, ``HK-METHOD-UNKNOWN``, and ``HK-MIX-MEMBER`` where a member cannot.
    """
    where = Where(registry, offline, progress)
    source = adapter_source(reference, where)
    adapter = open_adapter(source.path, verify=False)
    checks = [_files(adapter)]
    mix = _opened(adapter, source.reference, where) if adapter.manifest.kind == "mix" else None
    if mix is not None:
        checks.append(_members(mix))
    record, shown = _base(adapter, base, where)
    used = _same_base(adapter, source.reference, record, allow_base_mismatch)
    for one in mix.adapters if mix is not None else ():
        used += _same_base(one.folder, one.reference, record, allow_base_mismatch)
    checks.append(Check("base", _proof(adapter, record, used)))
    checks += [_tensors(one.folder, record, shown, one.name) for one in (mix.adapters if mix is not None else ())]
    if WEIGHTS_NAME in {entry.path for entry in adapter.manifest.files} and adapter.manifest.method:
        checks.append(_tensors(adapter, record, shown))
    return Verified(
        reference=source.reference,
        path=source.path,
        digest=adapter.manifest.digest,
        base=shown,
        checks=tuple(checks),
        unlisted=adapter.unlisted(),
        overrides=tuple(dict.fromkeys([*adapter.manifest.overrides, *used])),
    )


def require_finite(adapter: AdapterFolder) -> None:
    """Raises ``HK-NAN`` naming every tensor of an adapter that holds a NaN or an infinity."""
    if WEIGHTS_NAME not in {entry.path for entry in adapter.manifest.files}:
        return
    from safetensors import safe_open

    from hubkit.tensors.parts.values import require_finite as refuse_others

    with safe_open(adapter.weights_path, framework="pt") as file:
        refuse_others(((name, file.get_tensor(name)) for name in file.keys()), str(adapter.weights_path))  # noqa: SIM118


def _files(adapter: AdapterFolder) -> Check:
    """Names, kinds, sizes and digests of all files, from their bytes as they are now."""
    manifest, folder = adapter.manifest, adapter.path
    check_names([MANIFEST_NAME, *(entry.path for entry in manifest.files)], str(folder))
    wrong: list[str] = []
    for entry in manifest.files:
        path = folder / entry.path
        with refusing(path), path.open("rb") as file:
            check_allowed(entry.path, file.read(512), str(folder))
            file.seek(0)
            have = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if have != entry.sha256:
            wrong.append(f"{entry.path}: {have}, not {entry.sha256}")
    if wrong:
        what = f"the files of {manifest.name!r} are not those of its manifest"
        fix = "pull it again; after a wanted change: hubkit pack"
        raise HubkitError("HK-FILES", what, where=f"{folder / MANIFEST_NAME}#/files", have=wrong, fix=fix)
    if manifest.kind == "mix" and not manifest.files:
        return Check("files", "the manifest is whole; a mix has no other files")
    size = sum(entry.size for entry in manifest.files)
    return Check("files", f"{len(manifest.files)} files, {size} bytes: every one is what the manifest says")


def _opened(adapter: AdapterFolder, reference: str, where: Where) -> OpenedMix:
    """The mix with its adapters; where one cannot be looked at, nothing is decided."""
    try:
        return open_mix(adapter, parse_reference(reference), where)
    except HubkitError as error:
        if isinstance(error.__cause__, HubkitError) and error.__cause__.code in UNREACHABLE:
            error.status = UNDECIDED
        raise


def _members(mix: OpenedMix) -> Check:
    """Each adapter has the digest it was mixed with (`open_mix`), and its bytes are those of its manifest."""
    for one in mix.adapters:
        _files(one.folder)
    count = f"{len(mix.adapters)} adapter{'s' if len(mix.adapters) > 1 else ''}"
    return Check("members", f"{count} in {mix.tree}: every one, to the byte, is the one that was mixed")


def _base(adapter: AdapterFolder, base: Path | str | None, where: Where) -> tuple[BaseRecord, str]:
    """The identity of the base to compare with, and what to call it."""
    want = adapter.manifest.base
    if want is None:
        what = "the manifest names no base, so nothing can be compared"
        raise _undecided(adapter, what, have=f"kind {adapter.manifest.kind}")
    named = base or want.source or ""
    try:
        reference = base_reference(named, None if base else want.revision) if named else None
    except HubkitError:
        if base:
            raise
        reference = None  # the manifest's source is informative: a name that means nothing here
    if reference is None or (base is None and reference.path is not None):
        raise _undecided(adapter, "where the base is, is not known here", have=str(named) or "no source")
    if where.offline and reference.path is None:
        raise _undecided(adapter, "offline the base can only be a folder", have=str(reference))
    try:
        return base_record(named, None if base else want.revision, where), str(reference)
    except HubkitError as error:
        if base or error.code not in UNREACHABLE:
            raise
        raise _undecided(adapter, "the base cannot be looked at", have=f"{error.code}: {error.what}") from error


def _undecided(adapter: AdapterFolder, what: str, have: str) -> HubkitError:
    return HubkitError(
        "HK-BASE-UNPROVEN",
        what,
        where=f"{adapter.path / MANIFEST_NAME}#/base",
        want="a base to compare with",
        have=have,
        fix=f"hubkit verify {adapter.path} --base DIR-OR-ORG/NAME",
        status=UNDECIDED,
    )


def _same_base(adapter: AdapterFolder, where: str, record: BaseRecord, allow: bool) -> list[str]:
    from hubkit.artifact.identity.base_match import require_same_base

    want = adapter.manifest.base
    assert want is not None
    return require_same_base(
        adapter.manifest.name, where, want, record.fingerprint, adapter.base_tensors(), record.tensors, allow
    )


def _proof(adapter: AdapterFolder, record: BaseRecord, used: list[str]) -> str:
    want: BaseFingerprint | None = adapter.manifest.base
    have = record.fingerprint
    if used:
        return f"another base, allowed by {', '.join(used)}"
    if want is not None and want.weights and want.weights == have.weights:
        return f"the values of all {len(record.tensors)} tensors are those it was trained on"
    return f"its {len(have.files)} weight files are those it was trained on"


def _tensors(adapter: AdapterFolder, record: BaseRecord, shown: str, name: str = "tensors") -> Check:
    """Each tensor has its place and shape at the base's sites, none is missing, all values are finite.

    Of an adapter that is only carried, shapes and what is missing are not known.
    """
    from hubkit.methods.reading import base_of_tensors, check_tensors
    from hubkit.tensors.base.base import Base

    local = (Path(shown) / "config.json").is_file()  # its files say what is in packed weights
    base = Base.from_folder(Path(shown)) if local else base_of_tensors(record.tensors, record.fingerprint.config, shown)
    try:
        tensors, sites = check_tensors(adapter, base)
    except HubkitError as error:
        if error.code == "HK-METHOD-UNKNOWN":
            error.status = UNDECIDED  # without the method nobody can say what its tensors should be
        raise
    said = "each at a module of the base" if carried_type(adapter.manifest.method) else "all there, all fit"
    return Check(name, f"{tensors} tensors at {sites} sites: {said}, all finite")
