"""`probe`: whether a running server applies what was locked: a readiness probe for containers.

Needs the lock and the probes of its adapters, nothing else: no base, no weights, no registry. Each ``probes.json`` is
the one that the lock names by its digest, wherever it lies: in the store, in the adapter's folder, in a deployment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.arguments import checked
from hubkit.documents.files import read
from hubkit.documents.lock import LOCK_NAME, Lock, LockedAdapter
from hubkit.documents.probes import MAX_BYTES, PROBES_NAME, Probes
from hubkit.documents.schema import canonical, sha256
from hubkit.documents.shown import Shown
from hubkit.engines.runtimes.asking import DTYPES, asked, bound_of, runtime_at
from hubkit.engines.runtimes.fit import Fit
from hubkit.engines.runtimes.runtime import Runtime, chosen
from hubkit.engines.runtimes.wire import TIMEOUT
from hubkit.errors import UNDECIDED, HubkitError
from hubkit.named.replaying import F32, without_probes
from hubkit.registry.reference import parse_reference
from hubkit.registry.store.store import Store


@dataclass(frozen=True)
class ProbedAdapter:
    """One locked adapter that the server applies as it should.

    Args:
        name: in the lock.
        served: what the server calls it.
        prompts: how many were asked.
        fit: what the answers say.
    """

    name: str
    served: str
    prompts: int
    fit: Fit


@dataclass(frozen=True, repr=False)
class Probed(Shown):
    """A server that applies what was locked.

    Args:
        url: its address.
        engine: what it is.
        proven: hubkit's reader was tried on the real server.
        lock: digest of the lock.
        adapters: what was asked for, in the lock's order.
    """

    url: str
    engine: str
    proven: bool
    lock: str
    adapters: tuple[ProbedAdapter, ...]


@checked
def probe(
    url: str,
    *,
    lock: Path | str = LOCK_NAME,
    model: str | None = None,
    dtype: str | None = None,
    timeout: float = TIMEOUT,
) -> Probed:
    """Asks a running server for the probes of every locked adapter.

    Args:
        url: the server's address.
        lock: the lock; folders named in it are relative to it.
        model: what the server calls the adapter, where only one is locked; found by name and digest without it.
        dtype: in which the server computes; by default what the lock's target says of it, else ``f32``.
        timeout: seconds that one answer may take.

    Raises:
        HubkitError: ``HK-NOOP``, ``HK-SCALE``, ``HK-PROBE-*``, ``HK-RUNTIME-MODEL`` where an adapter is not served as
            it should be; with status 3 ``HK-RUNTIME-*`` of a server that cannot be asked, ``HK-PROBES-MISSING``,
            ``HK-PROBE-WEAK``; ``HK-MISSING``, ``HK-SCHEMA``, ``HK-OPTIONS``. Several faults are told as one, the first.
    """
    path = Path(lock)
    pinned = Lock.read(path)
    folder = path if path.is_dir() else path.parent
    if dtype is not None:
        bound_of(dtype)
    if not pinned.adapters:
        what = "the lock holds no adapter, so there is nothing to ask for"
        raise HubkitError("HK-PROBES-MISSING", what, where=str(path), status=UNDECIDED)
    every = {one.name: _probes(one, folder) for one in pinned.adapters}
    runtime = runtime_at(url, timeout)
    target = pinned.targets.get(runtime.engine, {})
    stated = str(target.get("dtype", F32))
    dtype = dtype or (stated if stated in DTYPES else F32)
    alone = len(pinned.adapters) == 1
    if not alone and target.get("serve", "mix") == "mix":
        raise _mixed(pinned, str(path))
    found, faults = [], []
    for one in pinned.adapters:
        try:
            digest = _served(pinned, one)
            found.append(_asked(runtime, one, digest, every[one.name], model if alone else None, dtype))
        except HubkitError as error:
            faults.append((one.name, error))
    if faults:
        first = faults[0][1]
        first.have += [f"{name}: {error.code}: {error.what}" for name, error in faults[1:]]
        raise first
    return Probed(runtime.server.url, runtime.engine, runtime.proven, pinned.digest, tuple(found))


def _asked(
    runtime: Runtime, one: LockedAdapter, digest: str, probes: Probes, model: str | None, dtype: str
) -> ProbedAdapter:
    """Asks for one adapter, which should act at its weight in the lock."""
    scales = probes.scales if len(probes.scales) > 2 else (1.0, 1.0)
    if not scales[0] <= one.weight <= scales[-1]:
        what = f"the lock weighs {one.name!r} by {one.weight:g}, where its probes do not reach"
        want = f"{scales[0]:g} to {scales[-1]:g}"
        raise HubkitError("HK-PROBES-MISSING", what, where=one.source, want=want, status=UNDECIDED)
    entry = chosen(runtime, one.name, digest, model)
    fit = asked(runtime, probes, entry, dtype=dtype, expected=one.weight)
    return ProbedAdapter(one.name, entry.path or entry.name, len(probes.prompts), fit)


def _served(pinned: Lock, one: LockedAdapter) -> str:
    """The digest by which a deployment names what it serves alone; of its weight, too, where that is not 1."""
    if one.weight == 1.0:
        return one.digest
    return sha256(canonical({pinned.mix: [{"digest": one.digest, "weight": one.weight}]}))


def _probes(one: LockedAdapter, folder: Path) -> Probes:
    """The probes of a locked adapter, known by their digest.

    Raises:
        HubkitError: ``HK-PROBES-MISSING`` where it was locked without, or they are in none of the places.
    """
    wanted = next((entry.sha256 for entry in one.files if entry.path == PROBES_NAME), None)
    if wanted is None:
        raise without_probes(one.name, one.source)
    places = list(_places(one, folder))
    for place in places:
        try:
            data = read(place / PROBES_NAME, MAX_BYTES)
        except (FileNotFoundError, HubkitError):
            continue
        if sha256(data) == wanted:
            return Probes.from_bytes(data, str(place / PROBES_NAME))
    error = without_probes(one.name, one.source, fix="hubkit pull, on this machine")
    error.what = f"the probes of {one.name!r} are not on this machine"
    error.want, error.have = [f"{PROBES_NAME}, {wanted}"], [f"not in {place}" for place in places]
    raise error


def _places(one: LockedAdapter, folder: Path) -> Iterator[Path]:
    """Where an adapter's files may lie: the deployment that the lock is in, the store, its folder."""
    yield from sorted((folder / "adapters").glob(f"{one.name}*"))
    yield Store().path(one.digest)
    path = parse_reference(one.source).path
    if path is not None:
        yield folder / path


def _mixed(pinned: Lock, where: str) -> HubkitError:
    """Several adapters that are served as one answer like none of them."""
    what = f"{len(pinned.adapters)} adapters are served as one mix, which has no probes of its own"
    fix = 'make one of them: hubkit compose, hubkit pack --probes; or serve = "each" in [targets.ENGINE]'
    return HubkitError(
        "HK-PROBES-MISSING", what, where=where, have=[one.name for one in pinned.adapters], fix=fix, status=UNDECIDED
    )
