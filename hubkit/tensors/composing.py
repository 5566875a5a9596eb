"""Several adapters' deltas made one low-rank delta, site by site: operator, then the best approximation of the rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.delta import Delta
from hubkit.tensors.operators import Member, Operator, combine, generator_for, normalized, operator_named
from hubkit.tensors.site import Site
from hubkit.tensors.truncate import Truncated, require_finite, truncate, truncate_dense
from hubkit.tensors.workers import in_order, workers_for


@dataclass(frozen=True)
class ComposeOptions:
    """How deltas become one.

    Args:
        operator: what is done entry by entry.
        density: part of the entries that a pruning operator keeps.
        seed: of what is dropped at random, and of the random columns that find a dense delta's range.
        rank: the largest rank of the result; None for no limit.
        energy: part of the energy, ‖Δ_k‖² / ‖Δ‖², to keep at every site with the smallest one rank that does.
    """

    operator: Operator
    density: float | None = None
    seed: int = 0
    rank: int | None = None
    energy: float | None = None

    @property
    def cuts(self) -> bool:
        """Whether singular values may be left out."""
        return self.rank is not None or self.energy is not None


def compose_options(
    method: str, density: float | None = None, seed: int = 0, rank: int | None = None, energy: float | None = None
) -> ComposeOptions:
    """Checked options.

    Raises:
        HubkitError: ``HK-OPERATOR``, ``HK-DENSITY``; ``HK-RANK`` below 1; ``HK-ENERGY`` outside (0, 1].
    """
    operator = operator_named(method, density)
    if rank is not None and rank < 1:
        raise HubkitError("HK-RANK", "the rank is too small", want="at least 1", have=str(rank), status=USAGE)
    if energy is not None and not 0 < energy <= 1:
        raise HubkitError(
            "HK-ENERGY", "this is no part of the energy", want="0 < energy <= 1", have=str(energy), status=USAGE
        )
    return ComposeOptions(operator, density, seed, rank, energy)


@dataclass(frozen=True)
class Composition:
    """One low-rank delta per site.

    Args:
        factors: site -> (left (out, k), right (k, in)) with left @ right the delta; k up to `rank`.
        rank: the largest k.
        energy: part of the energy kept over all sites together.
        least: part kept where it is least.
        least_site: that site.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    energy: float
    least: float
    least_site: str


@dataclass(frozen=True)
class _Job:
    site: Site
    members: Sequence[tuple[str, float, Delta]]


def compose_deltas(
    sites: Iterable[Site],
    weights: Sequence[tuple[str, float]],
    of: Callable[[str, Site], Delta | None],
    how: ComposeOptions,
) -> Composition:
    """Makes one delta of the members' at every site that a member acts at.

    Args:
        sites: in the order of the result.
        weights: (member, weight).
        of: a member's delta at a site, None where it does not act; called in this thread.

    Raises:
        HubkitError: ``HK-COMPOSE`` for a delta with a bias, and for one that is not low-rank where neither rank nor
            energy say how to make it so; ``HK-OPERATOR``; ``HK-NAN``; what `of` raises.
    """
    names = [name for name, _ in weights]
    factors = normalized(how.operator, [weight for _, weight in weights])
    chosen = list(sites)
    jobs = _jobs(chosen, list(zip(names, factors, strict=True)), of, how)
    largest = max((site.shape[0] * site.shape[1] * site.dtype.itemsize for site in chosen), default=1)
    workers = workers_for(largest * (1 if how.operator.linear else 4))
    made = dict(in_order(lambda job: (job.site.name, _made(job, how)), jobs, workers))
    if how.energy is not None:
        rank = max((one.rank_for(how.energy) or one.left.shape[1] for one in made.values()), default=1)
        made = {site: one.first(rank) for site, one in made.items()}
    least = min(made, key=lambda site: made[site].kept)
    total = sum(one.total for one in made.values())
    kept = sum(one.kept * one.total for one in made.values())
    return Composition(
        {site: (one.left, one.right) for site, one in made.items()},
        max(1, *(int(one.left.shape[1]) for one in made.values())),
        kept / total if total > 0 else 1.0,
        made[least].kept,
        least,
    )


def _jobs(
    sites: Sequence[Site],
    weights: Sequence[tuple[str, float]],
    of: Callable[[str, Site], Delta | None],
    how: ComposeOptions,
) -> Iterator[_Job]:
    for site in sites:
        found = [(name, weight, delta) for name, weight in weights if (delta := of(name, site)) is not None]
        biased = [name for name, _, delta in found if delta.bias is not None]
        if biased:
            raise _refusal(f"the change of {site.name} has a bias, which no low-rank adapter can hold", biased)
        dense = [name for name, _, delta in found if delta.dense is not None]
        if dense and how.operator.linear and not how.cuts:
            fix = "--rank K writes the best approximation; or hubkit merge, which needs none"
            raise _refusal(f"the change of {site.name} is not low-rank", dense, fix)
        if found:
            yield _Job(site, found)


def _refusal(what: str, members: Sequence[str], fix: str = "") -> HubkitError:
    apart = "keep them apart: hubkit generate and hubkit merge take several adapters at once"
    return HubkitError("HK-COMPOSE", what, have=members, fix=fix or apart)


def _made(job: _Job, how: ComposeOptions) -> Truncated:
    """The result at one site; runs in a worker."""
    site = job.site
    limit = min(site.shape) if how.rank is None else min(how.rank, *site.shape)
    sketch = generator_for(how.seed, site.name, "", "sketch")
    if how.operator.prunes:
        drawn = how.operator.prunes == "random"
        members = [
            Member(weight, delta, generator_for(how.seed, site.name, name) if drawn else None)
            for name, weight, delta in job.members
        ]
        require_finite(site.name, torch.tensor([member.weight for member in members], dtype=torch.float32))
        combined = combine(how.operator, members, how.density)
        require_finite(site.name, combined)
        return truncate_dense(combined, limit, sketch)
    total = Delta()
    for _, weight, delta in job.members:
        total = total.plus(delta.scaled(weight))
    if total.dense is not None:
        matrix = total.matrix()
        assert matrix is not None
        require_finite(site.name, matrix)
        return truncate_dense(matrix, limit, sketch)
    assert total.left is not None
    assert total.right is not None
    require_finite(site.name, total.left, total.right)
    if how.energy is None and (how.rank is None or total.right.shape[0] <= how.rank):
        return _whole(total.left, total.right, how.cuts)
    return truncate(total.left, total.right, limit)


def _whole(left: Tensor, right: Tensor, weigh: bool) -> Truncated:
    """The factors as they are: nothing is left out. Their energy is computed where it is compared with other sites'."""
    energy = torch.zeros(1, dtype=torch.float64)
    if weigh:
        b, a = left.double(), right.double()
        energy = ((b.t() @ b) * (a @ a.t())).sum()[None]
    return Truncated(left, right, energy, float(energy))
