"""`verify`: prove that an adapter is whole, that its tensors are what its method makes, and which base it belongs to.

Of a merged checkpoint the whole merge is made again, tensor by tensor, from base and adapters. Every byte is hashed
again, whatever was hashed before. Where the base cannot be looked at, the answer is "undecided" (exit status 3), never
"yes".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.carried import carried_type
from hubkit.artifact.folder import WEIGHTS_NAME, AdapterFolder, open_adapter
from hubkit.documents.arguments import checked
from hubkit.documents.manifest import MANIFEST_NAME, BaseFingerprint
from hubkit.documents.mix import KINDS
from hubkit.documents.shown import Shown
from hubkit.engines.runtimes.wire import TIMEOUT
from hubkit.errors import UNDECIDED, HubkitError
from hubkit.named.members import OpenedMix, open_mix
from hubkit.named.merging import prepared, require_into
from hubkit.named.parents import open_parents
from hubkit.named.replaying import F32, replayed_here, said, served_by
from hubkit.named.sound import remarks, require_files
from hubkit.named.sources import (
    Source,
    adapter_source,
    base_record,
    base_reference,
    base_with_record,
    doubted,
)
from hubkit.named.terms import Term, mix_of
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference, parse_reference

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
        notes: what is odd about its values, none of which is wrong.
    """

    reference: str
    path: Path
    digest: str
    base: str
    checks: tuple[Check, ...]
    unlisted: tuple[str, ...]
    overrides: tuple[str, ...]
    notes: tuple[str, ...] = ()


@checked
def verify(
    reference: Path | str,
    *,
    base: Path | str | None = None,
    parents: Sequence[Path | str] = (),
    probes: bool = False,
    runtime: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    timeout: float = TIMEOUT,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    progress: Progress | None = None,
) -> Verified:
    """Prove an adapter.

    Args:
        reference: a folder, or a repository that is pulled.
        base: folder or repository of the base; by default the one its manifest names. That of a merged checkpoint is
            pulled, any other compared by what the registry lists.
        parents: of a merged checkpoint: where adapters are that it was made from, if not where its manifest says.
        probes: load the base and compute the adapter's probes again, at every scale.
        runtime: address of a running server that is asked for the probes; the base is then compared by its answers
            alone, unless `base` or `probes` is given, too.
        model: what that server calls the adapter; found by name and digest without it.
        dtype: in which the probes are computed, here or there: ``f32`` (the default), ``f16``, ``bf16``, ``q8_0``.
        timeout: seconds that one answer of the server may take.
        registry: where, if not the default registry.
        offline: use only what was pulled before.
        allow_base_mismatch: go on with another base; recorded in the result.
        progress: of the pull.

    Raises:
        HubkitError: what opening raises; ``HK-FILES`` with every difference; ``HK-NAME``, ``HK-PICKLE``,
            ``HK-FORBIDDEN-FILE``, ``HK-SAFETENSORS``; ``HK-KEYS``, ``HK-SHAPE``, ``HK-NAN``; ``HK-BASE-MISMATCH``;
            ``HK-MIX-MEMBER`` for a member of a mix, ``HK-MERGE-DIFFERS`` for a merged checkpoint that is another; with
            status 3 ``HK-BASE-UNPROVEN`` where the base cannot be looked at, ``HK-METHOD-UNKNOWN``,
            ``HK-MERGE-UNPROVEN`` where a parent cannot be had, and ``HK-MIX-MEMBER`` where a member cannot. Of probes:
            ``HK-NOOP``, ``HK-SCALE``, ``HK-PROBE-*``, ``HK-PROBES-MISSING``, and ``HK-RUNTIME-*`` of a server.
    """
    where = Where(registry, offline, progress)
    source = adapter_source(reference, where)
    with doubted(source):
        adapter = open_adapter(source.path, verify=False)
        checks = [Check("files", require_files(adapter))]
        if runtime is not None:
            shown, found = served_by(runtime, adapter, model, dtype or F32, timeout)
            checks.append(Check("runtime", said(found, shown)))
            if base is None and not probes:
                return _verified(source, adapter, shown, checks, [])
        shown, used = _proven(checks, adapter, source, base, parents, where, allow_base_mismatch)
        if probes:
            checks.append(Check("probes", replayed_here(adapter, source, base, dtype or F32, where)))
        return _verified(source, adapter, shown, checks, used)


def _proven(
    checks: list[Check],
    adapter: AdapterFolder,
    source: Source,
    base: Path | str | None,
    parents: Sequence[Path | str],
    where: Where,
    allow: bool,
) -> tuple[str, list[str]]:
    """Adds to `checks` what is proven with the base; the base as it was named, and the overrides that this needed."""
    used: list[str] = []
    mix = _opened(adapter, source.reference, where) if adapter.manifest.kind == "mix" else None
    if mix is not None:
        checks.append(_members(mix))
    try:
        record, shown, folder = _base(adapter, base, where, source.stored is None)
        used += _same_base(adapter, source.reference, record, allow)
        for one in mix.adapters if mix is not None else ():
            used += _same_base(one.folder, one.reference, record, allow)
        checks.append(Check("base", _proof(adapter, record, used)))
        if adapter.manifest.kind == "model":
            checks.append(_made_again(adapter, folder, open_parents(adapter, parents, where)))
    except HubkitError as error:
        if error.status == UNDECIDED and adapter.manifest.kind == "model":
            error.have += [f"proven: {check.name}: {check.detail}" for check in checks]
        raise
    checks += [_tensors(one.folder, record, shown, one.name) for one in (mix.adapters if mix is not None else ())]
    if WEIGHTS_NAME in {entry.path for entry in adapter.manifest.files} and adapter.manifest.method:
        checks.append(_tensors(adapter, record, shown))
    return shown, used


def _verified(source: Source, adapter: AdapterFolder, base: str, checks: list[Check], used: list[str]) -> Verified:
    overrides = tuple(dict.fromkeys([*adapter.manifest.overrides, *used]))
    digest, unlisted = adapter.manifest.digest, adapter.unlisted()
    notes = remarks(adapter)
    return Verified(source.reference, source.path, digest, base, tuple(checks), unlisted, overrides, notes)


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
        require_files(one.folder)
    count = f"{len(mix.adapters)} adapter{'s' if len(mix.adapters) > 1 else ''}"
    return Check("members", f"{count} in {mix.tree}: every one, to the byte, is the one that was mixed")


def _base(adapter: AdapterFolder, base: Path | str | None, where: Where, own: bool) -> tuple[BaseRecord, str, Path]:
    """The identity of the base to compare with, what to call it, and its folder, which a merged checkpoint needs.

    Args:
        own: the adapter is a folder here, not one that was pulled.
    """
    whole = adapter.manifest.kind == "model"
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
    if reference is None or (base is None and not _is_known(reference, own)):
        raise _undecided(adapter, "where the base is, is not known here", have=str(named) or "no source")
    revision = None if base else want.revision
    try:
        if whole or (where.offline and reference.path is None):
            source, record = base_with_record(named, revision, where)
            return record, source.reference, source.path
        return base_record(named, revision, where), str(reference), Path(str(reference))
    except HubkitError as error:
        if (base and not where.offline) or error.code not in UNREACHABLE:
            raise
        raise _undecided(adapter, "the base cannot be looked at", f"{error.code}: {error.what}", error.fix) from error


def _is_known(reference: Reference, own: bool) -> bool:
    """Whether a base that only a manifest names is to be looked for: a folder where the adapter is the user's own."""
    return reference.path is None or (own and (reference.path / "config.json").is_file())


def _undecided(adapter: AdapterFolder, what: str, have: str, fix: str = "") -> HubkitError:
    base = adapter.manifest.base
    named = f"  ({base.source} @ {base.revision})" if base and base.source and base.revision else ""
    given = f"hubkit verify {adapter.path} --base DIR-OR-ORG/NAME"
    return HubkitError(
        "HK-BASE-UNPROVEN",
        what,
        where=f"{adapter.path / MANIFEST_NAME}#/base",
        want=f"{base.weights or base.layout}{named}" if base else "a base to compare with",
        have=have,
        fix=f"{fix}    or    {given}" if fix else given,
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


def _made_again(merged: AdapterFolder, base: Path, parents: list[Term]) -> Check:
    """Every tensor of a merged checkpoint, made again from base and adapters as its manifest says, is the same."""
    from hubkit.tensors.device import arithmetic
    from hubkit.tensors.files.dtypes import dtype_named
    from hubkit.tensors.parts.mix import to_document
    from hubkit.tensors.weights.proof import differs, replay

    how, here = merged.manifest.composition or {}, arithmetic()
    kinds = [kind for kind in KINDS if to_document(mix_of(parents, kind)) == merged.manifest.mix]
    if not kinds:
        fault = f"{MANIFEST_NAME}#/mix: neither the sum nor the stack of {', '.join(one.name for one in parents)}"
        raise differs(merged.path, [fault], "the manifest that belongs to it")
    into = str(how.get("into", "trained"))
    require_into(into)
    dtype = dtype_named(str(how["dtype"]) if "dtype" in how else None)
    ready = prepared(base, parents, mix_of(parents, kinds[0]), into, dtype, measured=False)
    exact = {name: how.get(name) for name in here} == here
    try:
        off = replay(merged.path, ready.plan, ready.shards, dtype, exact=exact, packed=into == "4bit")
    except HubkitError as error:
        if exact or into != "4bit" or error.code != "HK-MERGE-DIFFERS":
            raise
        error.code, error.status = "HK-MERGE-UNPROVEN", UNDECIDED
        error.have.insert(0, "packed into 4 bits on another processor or torch, where a rounding may turn a code")
        raise
    said = "each the same, bit for bit"
    if off:
        said = f"{len(off)} differ in {sum(off.values())} values, by one unit in the last place at most"
        said += f"; merged on {how.get('processor', 'an unknown processor')}, torch {how.get('torch', 'unknown')}"
    count = f"{len(parents)} adapter{'s' if len(parents) > 1 else ''}"
    return Check("merge", f"all tensors made again from the base and {count}: {said}")


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
