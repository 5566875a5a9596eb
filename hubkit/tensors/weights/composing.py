"""Several adapters' deltas made one, site by site: operator, then the best approximation of the rank.

Without a limit on rank or energy nothing is left out: a sum of low-rank deltas stays factors, and what factors cannot
hold exactly (a dense change, a bias, a pruned delta) stays a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.delta import Delta
from hubkit.tensors.base.site import Site
from hubkit.tensors.seed import generator_for
from hubkit.tensors.weights.operators import Member, Operator, combine, normalized, operator_named
from hubkit.tensors.weights.truncate import WHOLE, Truncated, require_finite, truncate, truncate_dense, truncate_stack
from hubkit.tensors.weights.workers import in_order, workers_for

STACK = 4 << 20
"""Bytes of factors in fp64 that are truncated in one go: fewer steps, and still in a core's cache."""


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
    """One delta per site.

    Args:
        factors: site -> (left (out, k), right (k, in)) with left @ right the delta; k up to `rank`.
        rank: the largest k, at least 1.
        energy: part of the energy kept over all sites together.
        least: part kept where it is least.
        least_site: that site.
        whole: site -> its delta as weight (out, in), bias (out,) or both, where it is not low-rank; none of them where
            the options cut.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    energy: float
    least: float
    least_site: str
    whole: Mapping[str, Delta] = field(default_factory=dict)


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
        HubkitError: ``HK-COMPOSE`` for the change of a bias or norm where rank or energy ask for a low-rank one;
            ``HK-OPERATOR``; ``HK-NAN``; what `of` raises.
    """
    names = [name for name, _ in weights]
    factors = normalized(how.operator, [weight for _, weight in weights])
    chosen = list(sites)
    jobs = _jobs(chosen, list(zip(names, factors, strict=True)), of, how)
    largest = max((site.shape[0] * site.shape[1] * site.dtype.itemsize for site in chosen), default=1)
    workers = workers_for(largest * (1 if how.operator.linear else 4))
    found = dict(pair for made in in_order(lambda jobs: _all(jobs, how), _stacks(jobs, how), workers) for pair in made)
    done = [(site.name, found[site.name]) for site in chosen if site.name in found]
    made = {site: one for site, one in done if isinstance(one, Truncated)}
    whole = {site: one for site, one in done if isinstance(one, Delta)}
    if how.energy is not None:
        rank = max((one.rank_for(how.energy) or one.left.shape[1] for one in made.values()), default=1)
        made = {site: one.first(rank) for site, one in made.items()}
    least = min(made, key=lambda site: made[site].kept, default="")
    total = sum(one.total for one in made.values())
    kept = sum(one.kept * one.total for one in made.values())
    return Composition(
        {site: (one.left, one.right) for site, one in made.items()},
        max([1, *(int(one.left.shape[1]) for one in made.values())]),
        kept / total if total > 0 else 1.0,
        made[least].kept if made else 1.0,
        least,
        whole,
    )


def _jobs(
    sites: Sequence[Site],
    weights: Sequence[tuple[str, float]],
    of: Callable[[str, Site], Delta | None],
    how: ComposeOptions,
) -> Iterator[_Job]:
    for site in sites:
        every = [(name, weight, delta) for name, weight in weights if (delta := of(name, site)) is not None]
        found = [(n, w, d) for n, w, d in every if any(t is not None for t in (d.left, d.dense, d.bias))]
        biased = [name for name, _, delta in found if delta.bias is not None or site.kind == "norm"]
        if biased and how.cuts:
            what = "a norm" if site.kind == "norm" else "a bias"
            raise HubkitError(
                "HK-COMPOSE",
                f"the change of {site.name} is one of {what}, which no low-rank adapter can hold",
                have=biased,
                fix="without --rank and --energy the exact change is written, as whole tensors",
            )
        if found:
            yield _Job(site, found)


def _stacks(jobs: Iterable[_Job], how: ComposeOptions) -> Iterator[list[_Job]]:
    """The jobs, those together whose sums have factors of one shape to truncate: up to `STACK` bytes of them.

    Which ones are together follows from their order alone, so that bits do not depend on the number of workers.
    """
    waiting: dict[tuple[int, ...], list[_Job]] = {}
    for job in jobs:
        rank = sum(0 if delta.right is None else delta.right.shape[0] for _, _, delta in job.members)
        low = how.operator.linear and all(delta.is_low_rank for _, _, delta in job.members)
        if not low or not _cut(rank, how):
            yield [job]
            continue
        stack = waiting.setdefault((rank, *job.site.shape), [])
        stack.append(job)
        if (len(stack) + 1) * rank * sum(job.site.shape) * 8 > STACK:
            yield waiting.pop((rank, *job.site.shape))
    yield from waiting.values()


def _cut(rank: int, how: ComposeOptions) -> bool:
    """Whether factors of `rank` columns and rows are more than what is asked for."""
    return how.energy is not None or (how.rank is not None and rank > how.rank)


def _all(jobs: list[_Job], how: ComposeOptions) -> list[tuple[str, Truncated | Delta]]:
    """The results at the sites of a stack; runs in a worker."""
    if len(jobs) == 1:
        return [(jobs[0].site.name, _made(jobs[0], how))]
    left, right, dtype = _stacked(jobs)
    if not torch.isfinite(left.sum() + right.sum()):
        for job, one, other in zip(jobs, left, right, strict=True):
            require_finite(job.site.name, one, other)
    made = truncate_stack(left, right, _limit(jobs[0].site, how), dtype)
    for job, cut in zip(jobs, made, strict=True):
        require_finite(job.site.name, torch.tensor(cut.total**0.5, dtype=dtype))
    return [(job.site.name, cut) for job, cut in zip(jobs, made, strict=True)]


def _stacked(jobs: list[_Job]) -> tuple[Tensor, Tensor, torch.dtype]:
    """The factors of several sums, (n, out, R) and (n, R, in) in fp64, written once; and the dtype they had."""
    factors = [[(w, d.left, d.right) for _, w, d in job.members] for job in jobs]
    rank = sum(0 if right is None else right.shape[0] for _, _, right in factors[0])
    rows, columns = jobs[0].site.shape
    left = torch.empty(len(jobs), rows, rank, dtype=torch.float64)
    right = torch.empty(len(jobs), rank, columns, dtype=torch.float64)
    dtype = torch.float64
    for index, members in enumerate(factors):
        start = 0
        for weight, up, down in members:
            if up is None or down is None:
                continue
            stop, dtype = start + down.shape[0], up.dtype
            left[index, :, start:stop].copy_(up).mul_(weight)
            right[index, start:stop] = down
            start = stop
    return left, right, dtype


def _limit(site: Site, how: ComposeOptions) -> int:
    return min(site.shape) if how.rank is None else min(how.rank, *site.shape)


def _made(job: _Job, how: ComposeOptions) -> Truncated | Delta:
    """The result at one site; runs in a worker."""
    site = job.site
    total = _pruned(job, how) if how.operator.prunes else _summed(job)
    require_finite(site.name, *(t for t in (total.left, total.right, total.dense, total.bias) if t is not None))
    if total.left is None or total.right is None or total.dense is not None or total.bias is not None:
        matrix = total.matrix()
        if not how.cuts:
            return Delta.full(matrix, total.bias)
        assert matrix is not None, "a bias alone is refused with the others"
        require_finite(site.name, matrix)
        sketch = generator_for(how.seed, site.name, "", "sketch")
        return truncate_dense(matrix, _limit(site, how), sketch, whole=WHOLE if how.operator.linear else 0)
    if not _cut(total.right.shape[0], how):
        return _whole(total.left, total.right, how.cuts)
    return truncate(total.left, total.right, _limit(site, how))


def _summed(job: _Job) -> Delta:
    """Σ wᵢ Δᵢ, with all factors joined at once."""
    scaled = [delta.scaled(weight) for _, weight, delta in job.members]
    lefts = [delta.left for delta in scaled if delta.left is not None]
    rights = [delta.right for delta in scaled if delta.right is not None]
    rest = Delta()
    for delta in scaled:
        rest = rest.plus(Delta.full(delta.dense, delta.bias))
    if not lefts:
        return rest
    return Delta(torch.cat(lefts, 1), torch.cat(rights), rest.dense, rest.bias)


def _pruned(job: _Job, how: ComposeOptions) -> Delta:
    """What a pruning operator makes of the members' weights, and of their biases."""
    require_finite(job.site.name, torch.tensor([weight for _, weight, _ in job.members], dtype=torch.float32))
    weights: list[Member] = []
    biases: list[Member] = []
    for name, weight, delta in job.members:
        one, other = (_drawing(how, job.site.name, name, *words) for words in ((), ("bias",)))
        if delta.left is not None or delta.dense is not None:
            weights.append(Member(weight, Delta(delta.left, delta.right, delta.dense), one))
        if delta.bias is not None:
            biases.append(Member(weight, Delta.full(delta.bias[:, None]), other))
    return Delta.full(
        combine(how.operator, weights, how.density) if weights else None,
        combine(how.operator, biases, how.density)[:, 0] if biases else None,
    )


def _drawing(how: ComposeOptions, *words: str) -> torch.Generator | None:
    """The generator of what one member loses in one tensor; None where nothing is drawn."""
    return generator_for(how.seed, *words) if how.operator.prunes == "random" else None


def _whole(left: Tensor, right: Tensor, weigh: bool) -> Truncated:
    """The factors as they are: nothing is left out. Their energy is computed where it is compared with other sites'."""
    energy = torch.zeros(1, dtype=torch.float64)
    if weigh:
        b, a = left.double(), right.double()
        energy = ((b.t() @ b) * (a @ a.t())).sum()[None]
    return Truncated(left, right, energy, float(energy))
