"""How adapters on one base get in each other's way, from their deltas alone: no data, no forward pass.

For two deltas Δa, Δb at one site, with orthonormal bases Qa, Qb of their column spaces (what they can write) or row
spaces (what they read):

    overlap         ‖Qaᵀ Qb‖²_F / min(ra, rb)      mean squared cosine of the principal angles: 0 disjoint, 1 the same
    cosine          ⟨Δa, Δb⟩ / (‖Δa‖ ‖Δb‖)         from the factors: Σ (BaᵀBb ∘ Aa Abᵀ)
    sign conflict   share of the entries that are large in both (the STRONG largest of each) and have opposite signs

Two random subspaces of n dimensions overlap by max(ra, rb) / n: `chance`. Random deltas conflict in half of the
entries. Weights count with their signs: what is compared is what a sum would add.

The advice is rules of thumb on the means over sites, the first that holds:

    keep separate   cosine at most OPPOSED
    ties            cosine at least REPEATED; or both overlaps at least SHARED and ABOVE_CHANCE times chance, with a
                    sign conflict of at least CONFLICT
    sum             everything else

The thresholds are conventions, not measurements of quality: two unrelated adapters lie far below them, two copies far
above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from hubkit.errors import HubkitError
from hubkit.tensors.base.delta import Delta
from hubkit.tensors.base.site import Site
from hubkit.tensors.weights.truncate import Spectrum, require_finite, spectrum
from hubkit.tensors.weights.workers import in_order, workers_for

STRONG = 0.2
"""Part of each delta's entries that counts as large: what TIES keeps in its paper."""
OPPOSED = -0.25
"""Cosine at or below which deltas of one size undo a quarter of each other's energy: keep them apart."""
REPEATED = 0.5
"""Cosine from which deltas repeat each other: their sum overshoots, their elected mean (TIES) does not."""
SHARED = 0.3
"""Overlap of rows and of columns from which deltas read and write the same directions, if it is above chance too."""
ABOVE_CHANCE = 2.0
CONFLICT = 0.4
"""Sign conflict, among entries large in both, from which TIES has something to elect in shared directions."""
SUM, TIES, APART = "sum", "ties", "keep separate"


@dataclass(frozen=True)
class PairAt:
    """Two members at one site; None where a figure does not exist: a delta that is zero, or not low-rank.

    Args:
        site: its name.
        columns: overlap of the column spaces.
        rows: overlap of the row spaces.
        chance: what random subspaces would give, (columns, rows).
        cosine: of the weighted deltas.
        conflict: sign conflict.
        norms: Frobenius norms of the weighted deltas.
    """

    site: str
    columns: float | None
    rows: float | None
    chance: tuple[float, float] | None
    cosine: float | None
    conflict: float | None
    norms: tuple[float, float]


@dataclass(frozen=True)
class Pair:
    """Two members at all sites where both act; the figures are means over sites, weighted by ‖Δa‖ ‖Δb‖.

    Args:
        members: their names.
        ratio: norm of the second over that of the first, over all of these sites.
        advice: ``sum``, ``ties`` or ``keep separate``.
        reason: one sentence with the figures that the advice rests on.
        sites: site by site.
    """

    members: tuple[str, str]
    columns: float | None
    rows: float | None
    chance: tuple[float, float] | None
    cosine: float | None
    conflict: float | None
    ratio: float | None
    advice: str
    reason: str
    sites: tuple[PairAt, ...]


@dataclass(frozen=True)
class Interference:
    """Every pair of members; the advice for all of them is the most careful of the pairs'."""

    members: tuple[tuple[str, float], ...]
    advice: str
    reason: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class _Side:
    """One member at one site, its weight in the delta."""

    delta: Delta
    spectrum: Spectrum | None
    norm: float


def interference(
    sites: Iterable[Site], weights: Sequence[tuple[str, float]], of: Callable[[str, Site], Delta | None]
) -> Interference:
    """Compares every two of the members.

    Args:
        weights: (member, weight), two or more.
        of: a member's delta at a site, None where it does not act; called in this thread.

    Raises:
        HubkitError: ``HK-REPORT`` for fewer than two members; ``HK-NAN``; what `of` raises.
    """
    if len(weights) < 2:
        have = [name for name, _ in weights]
        raise HubkitError("HK-REPORT", "one adapter interferes with nothing", want="two or more terms", have=have)
    chosen = list(sites)
    pairs = list(combinations([name for name, _ in weights], 2))
    found: dict[tuple[str, str], list[PairAt]] = {pair: [] for pair in pairs}
    largest = max((site.shape[0] * site.shape[1] * 4 for site in chosen), default=1)
    workers = workers_for(largest * (len(weights) + 2))
    for compared in in_order(_compare, _jobs(chosen, weights, of), workers):
        for pair, at in compared:
            found[pair].append(at)
    made = tuple(_summary(pair, tuple(found[pair])) for pair in pairs)
    careful = (APART, TIES, SUM)
    worst = min(made, key=lambda pair: careful.index(pair.advice))
    who = f"{worst.members[0]} and {worst.members[1]}: " if len(made) > 1 else ""
    return Interference(tuple(weights), worst.advice, who + worst.reason, made)


def _jobs(
    sites: Iterable[Site], weights: Sequence[tuple[str, float]], of: Callable[[str, Site], Delta | None]
) -> Iterator[tuple[str, dict[str, Delta]]]:
    for site in sites:
        deltas = {n: delta.scaled(weight) for n, weight in weights if (delta := of(n, site)) is not None}
        if len(deltas) > 1:
            for delta in deltas.values():
                require_finite(site.name, *(t for t in (delta.left, delta.right, delta.dense) if t is not None))
            yield site.name, deltas


def _compare(job: tuple[str, dict[str, Delta]]) -> list[tuple[tuple[str, str], PairAt]]:
    """Every pair at one site; runs in a worker."""
    site, deltas = job
    sides = {name: side for name, delta in deltas.items() if (side := _side(delta)) is not None}
    conflicts = _conflicts({name: side.delta for name, side in sides.items()})
    return [((a, b), _at(site, sides[a], sides[b], conflicts[a, b])) for a, b in combinations(sides, 2)]


def _side(delta: Delta) -> _Side | None:
    """None for a delta that changes biases alone."""
    if delta.dense is None and delta.left is not None and delta.right is not None:
        found = spectrum(delta.left, delta.right)
        return _Side(delta, found, float(found.values.square().sum().sqrt()))
    matrix = delta.matrix()
    if matrix is None:
        return None
    return _Side(Delta.full(matrix), None, float(torch.linalg.vector_norm(matrix, dtype=torch.float64)))


def _at(site: str, a: _Side, b: _Side, conflict: float | None) -> PairAt:
    columns = rows = chance = None
    if a.spectrum and b.spectrum and a.norm > 0 and b.norm > 0:
        ranks = a.spectrum.values.numel(), b.spectrum.values.numel()
        columns = _overlap(a.spectrum.left.t() @ b.spectrum.left, ranks)
        rows = _overlap(a.spectrum.right @ b.spectrum.right.t(), ranks)
        sides = a.spectrum.left.shape[0], a.spectrum.right.shape[1]
        chance = (min(1.0, max(ranks) / sides[0]), min(1.0, max(ranks) / sides[1]))
    size = a.norm * b.norm
    cosine = max(-1.0, min(1.0, _inner(a, b) / size)) if size > 0 else None
    return PairAt(site, columns, rows, chance, cosine, conflict, (a.norm, b.norm))


def _overlap(angles: Tensor, ranks: tuple[int, int]) -> float:
    return min(1.0, float(angles.square().sum()) / min(ranks))


def _inner(a: _Side, b: _Side) -> float:
    """⟨Δa, Δb⟩; from the factors where both have them."""
    x, y = a.delta, b.delta
    if a.spectrum and b.spectrum:
        assert x.left is not None and x.right is not None and y.left is not None and y.right is not None  # noqa: PT018
        left, right = x.left.double().t() @ y.left.double(), x.right.double() @ y.right.double().t()
        return float((left * right).sum())
    first, second = x.matrix(), y.matrix()
    assert first is not None
    assert second is not None
    return float((first * second).sum(dtype=torch.float64))


def _conflicts(deltas: dict[str, Delta]) -> dict[tuple[str, str], float | None]:
    """Sign conflict of every pair; None where no entry is large in both."""
    signs: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        matrix = delta.matrix()
        assert matrix is not None
        sizes = matrix.abs().flatten().numpy()
        index = sizes.size - max(1, int(STRONG * sizes.size))
        sizes.partition(index)
        signs[name] = matrix.sign().to(torch.int8) * (matrix.abs() >= float(sizes[index]))
    found: dict[tuple[str, str], float | None] = {}
    for a, b in combinations(deltas, 2):
        product = signs[a] * signs[b]
        both = int(torch.count_nonzero(product))
        found[a, b] = int(torch.count_nonzero(product < 0)) / both if both else None
    return found


def _summary(members: tuple[str, str], sites: tuple[PairAt, ...]) -> Pair:
    mean = {name: _mean(sites, name) for name in ("columns", "rows", "cosine", "conflict")}
    chances = [(at.chance, at.norms[0] * at.norms[1]) for at in sites if at.chance is not None]
    total = sum(size for _, size in chances)
    chance = None
    if total > 0:
        both = [sum(pair[side] * size for pair, size in chances) / total for side in (0, 1)]
        chance = (both[0], both[1])
    norms = [sum(at.norms[side] ** 2 for at in sites) ** 0.5 for side in (0, 1)]
    ratio = norms[1] / norms[0] if norms[0] > 0 else None
    advice, reason = _advice(mean["columns"], mean["rows"], chance, mean["cosine"], mean["conflict"])
    return Pair(
        members, mean["columns"], mean["rows"], chance, mean["cosine"], mean["conflict"], ratio, advice, reason, sites
    )


def _mean(sites: Sequence[PairAt], name: str) -> float | None:
    known = [(getattr(at, name), at.norms[0] * at.norms[1]) for at in sites if getattr(at, name) is not None]
    total = sum(size for _, size in known)
    return sum(value * size for value, size in known) / total if total > 0 else None


def _advice(
    columns: float | None,
    rows: float | None,
    chance: tuple[float, float] | None,
    cosine: float | None,
    conflict: float | None,
) -> tuple[str, str]:
    """The advice and the sentence that gives its reason; rules of thumb on the means, worst case first."""
    if cosine is None:
        return SUM, "they share no site where both change something"
    if cosine <= OPPOSED:
        return APART, f"they undo each other: cosine {cosine:.2f}, at or below {OPPOSED}"
    if cosine >= REPEATED:
        return TIES, f"they repeat each other, so a sum overshoots: cosine {cosine:.2f}, at least {REPEATED}"
    if columns is None or rows is None or chance is None:
        return SUM, f"they neither repeat nor undo each other: cosine {cosine:.2f}"
    figures = f"overlap of columns {columns:.2f} and rows {rows:.2f} (chance {chance[0]:.2f} and {chance[1]:.2f})"
    shared = all(
        value >= max(SHARED, ABOVE_CHANCE * random) for value, random in zip((columns, rows), chance, strict=True)
    )
    if shared and conflict is not None and conflict >= CONFLICT:
        return TIES, f"they change the same directions with other signs: {figures}, sign conflict {conflict:.2f}"
    if shared:
        return SUM, f"they change the same directions with the same signs: {figures}, cosine {cosine:.2f}"
    return SUM, f"they change different directions: {figures}, cosine {cosine:.2f}"
