"""Lowering: a mix of any adapters as one plain LoRA of one rank and scale 1, the form that every engine reads alike.

Engines read LoRA, and differ in the rest: SGLang and llama.cpp's converter lose rsLoRA's scale and patterns, MLX has
one rank and one scale for all, none adds several adapters up. What each of these does to a weight is known here, so it
is written out:

    Σ wᵢ sᵢ Bᵢ Aᵢ  =  [w₁ s₁ B₁, w₂ s₂ B₂, …] · [A₁; A₂; …]        exact; padded with zeros to one rank

A change that is not low-rank (DoRA, a module trained as a whole) becomes its best approximation of the smallest rank
within a budget, and nothing without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.delta import Delta
from hubkit.tensors.parts.mix import Mix, delta, leaves
from hubkit.tensors.parts.part import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.parts.adapter import Adapter

EXACT = 1e-6
"""Part of ‖Δ‖ that fp32 factors lose anyway: a cut that leaves out no more has left out nothing."""
FIRST = 32
"""Directions that are looked for first in a dense change; then twice as many, as long as it takes."""


@dataclass(frozen=True)
class Lowered:
    """A mix as one plain LoRA.

    Args:
        adapter: one rank at every site and scale 1; factors in fp32.
        said: what was done to get there, a line each.
        errors: site -> ‖Δ - Δ_k‖ / ‖Δ‖, of sites where something was left out; empty: it is exact.
    """

    adapter: Adapter
    said: tuple[str, ...]
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The rank of every site."""
        return max(int(part.A.shape[0]) for part in self.adapter.parts.values() if isinstance(part, LowRank))


def lower(
    name: str,
    mix: Mix,
    adapters: Mapping[str, Adapter],
    base: Base,
    *,
    rank: int | None = None,
    budget: float | None = None,
) -> Lowered:
    """The mix as one plain LoRA.

    Args:
        name: of the result.
        mix: which of `adapters` act, and how.
        base: with weights, where a method computes its change from them.
        rank: the largest rank allowed; None: as large as it has to be.
        budget: the largest ‖Δ - Δ_k‖ / ‖Δ‖ of a site; None: nothing may be left out.

    Raises:
        HubkitError: ``HK-LOWER`` with every reason why there is no such LoRA, and the choices; ``HK-RANK``,
            ``HK-ENERGY`` for a rank or budget out of range; ``HK-NAN``; ``HK-BASE-NEEDED``.
    """
    from hubkit.methods.composed import low_rank_adapter

    _check(rank, budget)
    used = [adapters[one] for one in dict.fromkeys(name for name, _ in leaves(mix))]
    refuse(name, unfit(used))
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    wrong: list[str] = []
    for site, change in _changes(mix, adapters, base):
        if change.bias is not None or site.kind == "norm":
            wrong.append(f"{site.name}: the change of a {'norm' if site.kind == 'norm' else 'bias'}")
            continue
        left, right, error = _factored(site, change, rank, budget)
        if error > max(budget or 0.0, EXACT):
            wrong.append(f"{site.name}: {error:.2g} of its change is beyond rank {right.shape[0]}")
        factors[site.name] = left.contiguous(), right.contiguous()
        errors |= {site.name: error} if error > EXACT else {}
    refuse(name, wrong)
    if not factors:
        refuse(name, ["it changes no weight"])
    most = max(int(right.shape[0]) for _, right in factors.values())
    adapter = low_rank_adapter(name, factors, most, {}, base)
    adapter.source, adapter.revision = used[0].source, used[0].revision
    adapter.require_finite(name)
    return Lowered(adapter, tuple(_said(mix, used, most, errors)), errors)


def unfit(adapters: list[Adapter]) -> list[str]:
    """Why adapters are not what a LoRA can say, whatever the budget; a line each, empty where they are."""
    reasons = [f"{one.name}: {one.method.unmergeable}" for one in adapters if one.method.unmergeable]
    return reasons + [
        f"{one.name}: it trains rows of the vocabulary" for one in adapters if one.base.rows.keys() & one.parts.keys()
    ]


def refuse(name: str, reasons: list[str]) -> None:
    """Raises ``HK-LOWER`` when there are reasons."""
    if reasons:
        what = f"{name!r} cannot be written as plain low-rank factors"
        fix = "a budget or a larger rank where it is a matter of rank; or merge it: hubkit merge; or leave it out"
        raise HubkitError("HK-LOWER", what, have=reasons, fix=fix)


def _check(rank: int | None, budget: float | None) -> None:
    if rank is not None and rank < 1:
        raise HubkitError("HK-RANK", "the rank is too small", want="at least 1", have=str(rank), status=USAGE)
    if budget is not None and not 0 <= budget < 1:
        what, want = "this is no part of a change", "0 <= budget < 1"
        raise HubkitError("HK-ENERGY", what, want=want, have=str(budget), status=USAGE)


def _changes(mix: Mix, adapters: Mapping[str, Adapter], base: Base) -> Iterator[tuple[Site, Delta]]:
    for site in base.sites.values():
        change = delta(mix, site, lambda name, site: adapters[name].delta(site))
        if change is not None and any(t is not None for t in (change.left, change.dense, change.bias)):
            yield site, change


def _factored(site: Site, change: Delta, rank: int | None, budget: float | None) -> tuple[Tensor, Tensor, float]:
    """B (out, k), A (k, in) in fp32, and the part of the change that they leave out."""
    from hubkit.tensors.weights.truncate import require_finite, truncate

    tensors = [t for t in (change.left, change.right, change.dense) if t is not None]
    require_finite(site.name, *tensors)
    if change.dense is not None:
        return _dense(site, change, min(rank or min(site.shape), *site.shape), budget or 0.0)
    assert change.left is not None, "a delta of nothing is passed over"
    assert change.right is not None, "factors come in pairs"
    left, right = change.left.float(), change.right.float()
    if rank is None or right.shape[0] <= rank:
        return left, right, 0.0
    cut = truncate(left, right, rank)
    return cut.left, cut.right, _left_out(cut.kept)


def _dense(site: Site, change: Delta, most: int, budget: float) -> tuple[Tensor, Tensor, float]:
    """The smallest rank, up to `most`, whose approximation of a dense change is within the budget."""
    from hubkit.tensors.seed import generator_for
    from hubkit.tensors.weights.truncate import truncate_dense

    matrix, asked = change.matrix(), min(FIRST, most)
    assert matrix is not None, "a dense change is a matrix"
    allowed = max(budget, EXACT)
    while True:
        found = truncate_dense(matrix, asked, generator_for(0, site.name, "", "sketch"))
        needed = found.rank_for(1 - allowed**2)
        if needed is not None or asked == most:
            found = found.first(needed or asked)
            return found.left.float(), found.right.float(), _left_out(found.kept)
        asked = min(2 * asked, most)


def _left_out(kept: float) -> float:
    return float(max(0.0, 1.0 - kept) ** 0.5)


def _said(mix: Mix, used: list[Adapter], rank: int, errors: Mapping[str, float]) -> Iterator[str]:
    """What was done, a line each."""
    weights = list(leaves(mix))
    if weights != [(used[0].name, 1.0)]:
        yield f"{len(weights)} adapters are one: " + " + ".join(f"{weight:g}·{name}" for name, weight in weights)
    for adapter in used:
        parts = [part for part in adapter.parts.values() if isinstance(part, LowRank)]
        ranks, scales = {int(part.A.shape[0]) for part in parts}, {float(part.scale) for part in parts}
        if len(parts) < len(adapter.parts):
            yield f"{adapter.name}: the change of {len(adapter.parts) - len(parts)} modules was factored"
        if scales - {1.0}:
            yield f"{adapter.name}: scale {_range(scales)} is in B"
        if ranks - {rank}:
            yield f"{adapter.name}: rank {_range(ranks)} is {rank} everywhere, padded with zeros"
    if errors:
        worst = max(errors, key=lambda site: errors[site])
        yield f"{len(errors)} sites are approximated; most is lost at {worst}: {errors[worst]:.2g} of its change"


def _range(values: set[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
