"""An adapter's probes held against what answers now: a server, or a live base on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hubkit.artifact.folder import AdapterFolder
from hubkit.documents.probes import PROBES_NAME, Probes
from hubkit.engines.runtimes.asking import asked, bound_of, require, runtime_at
from hubkit.engines.runtimes.fit import Fit, distance, fitted
from hubkit.engines.runtimes.runtime import chosen
from hubkit.errors import UNDECIDED, HubkitError
from hubkit.named.sources import Source, base_source, named_base
from hubkit.named.terms import Term, open_sources
from hubkit.registry.opening import Where

F32 = "f32"


def require_probes(folder: AdapterFolder) -> Probes:
    """The probes of an opened adapter.

    Raises:
        HubkitError: ``HK-PROBES-MISSING`` (status 3) where it has none; ``HK-SCHEMA``, ``HK-JSON``.
    """
    if PROBES_NAME not in {entry.path for entry in folder.manifest.files}:
        raise without_probes(folder.manifest.name, str(folder.path))
    return Probes.read(folder.path)


def without_probes(name: str, where: str, fix: str = "hubkit pack DIR --probes makes them") -> HubkitError:
    """``HK-PROBES-MISSING``: nothing can be decided."""
    what = f"{name!r} has no probes, so nobody can tell by answers whether it is applied"
    return HubkitError("HK-PROBES-MISSING", what, where=where, want=PROBES_NAME, fix=fix, status=UNDECIDED)


def replayed(members: Sequence[Term], base: Path, probes: Probes, dtype: str) -> tuple[Fit, float]:
    """Computes the probes again with transformers, at every scale.

    Args:
        members: the adapter or mix, as one term.
        base: folder of the base.
        dtype: in which it is computed: ``f32``, ``f16``, ``bf16``.

    Returns:
        what the answers at scale 1 say, and the largest distance at any scale.

    Raises:
        HubkitError: as `asking.require`; ``HK-PROBE-ROUNDING`` where a scale other than 1 is off.
    """
    from hubkit.engines.runtimes.asking import TORCH
    from hubkit.named.probing import Live

    bound = bound_of(dtype)
    live = Live(base, members, TORCH.get(dtype, dtype))
    found = fitted(probes, live.answers(probes.prompts, 1.0), bound=bound)
    require(found, probes, str(base), lambda: live.answers(probes.prompts, 0.0))
    apart = {scale: distance(probes, live.answers(probes.prompts, scale), scale) for scale in probes.scales}
    wrong = [f"scale {scale:g}: {off:.4f} nats" for scale, off in apart.items() if off > bound * max(scale, 1.0)]
    if wrong:
        what, want = "the probes are not what is computed now", f"within {bound:g} nats"
        raise HubkitError("HK-PROBE-ROUNDING", what, where=str(base), want=want, have=wrong, fix="--dtype bf16, if so")
    return found, max(apart.values())


def replayed_here(folder: AdapterFolder, source: Source, base: Path | str | None, dtype: str, where: Where) -> str:
    """What its base says with an adapter now, held against its probes; in a line.

    Args:
        folder: the adapter or mix, opened.
        source: the same, as it was named.
        base: folder or repository of its base; the one that its manifest names by default.

    Raises:
        HubkitError: as `require_probes` and `replayed`; ``HK-BASE-NEEDED``, what pulling raises.
    """
    probes = require_probes(folder)
    members = open_sources([(source, 1.0)], where)
    place = base_source(*named_base(base, None, folder.manifest.base), where).path
    found, largest = replayed(members, place, probes, dtype)
    return f"{said(found, f'transformers, {dtype}')}; at most {largest:.4f} nats off at {len(probes.scales)} scales"


def served_by(url: str, folder: AdapterFolder, model: str | None, dtype: str, timeout: float) -> tuple[str, Fit]:
    """Asks a running server for an adapter's probes.

    Args:
        url: the server's address.
        model: what the server calls the adapter; found by its name and digest without it.
        dtype: in which the server computes.
        timeout: seconds that one answer may take.

    Returns:
        who answered, and what it says.

    Raises:
        HubkitError: as `asking.asked`.
    """
    bound_of(dtype)
    probes = require_probes(folder)
    runtime = runtime_at(url, timeout)
    entry = chosen(runtime, folder.manifest.name, folder.manifest.digest, model)
    who = f"{runtime.engine} at {runtime.server.url}" + ("" if runtime.proven else " (unproven)")
    return who, asked(runtime, probes, entry, dtype=dtype)


def said(found: Fit, who: str) -> str:
    """What answers said of an adapter that acts as it should, in a line."""
    return (
        f"answers of {who} have it at scale {found.expected:g}: {found.off:.4f} nats off, {found.bound:g} allowed;"
        f" it moves them by {found.effect:.3f}"
    )
