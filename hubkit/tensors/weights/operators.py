"""Ways to make one delta of several, entry by entry. With Δᵢ the members' true deltas (scales and ranks included), wᵢ
their weights, sᵢ = sign(wᵢ), and d the density:

    sum         Σ wᵢ Δᵢ                                                    exact, stays low-rank
    average     Σ wᵢ Δᵢ / Σ wᵢ                                             exact, stays low-rank
    magnitude   Σ wᵢ top_d(Δᵢ)                                             top_d keeps the d·n entries of largest |x|
    dare        Σ wᵢ drop_d(Δᵢ)                                            drop_d(x) = x·b/d, b = 1 with probability d
    ties        Σᵢ∈S |wᵢ| xᵢ / max(|S|, 1),  xᵢ = sᵢ top_d(Δᵢ)             S = members with sign(xᵢ) = γ,
    dare-ties   the same of xᵢ = sᵢ drop_d(Δᵢ)                             γ = +1 where Σ xᵢ ≥ 0, else -1

TIES: Yadav et al. 2023, https://arxiv.org/abs/2306.01708 (trim, elect sign, disjoint mean). DARE: Yu et al. 2023,
https://arxiv.org/abs/2311.03099. Magnitude pruning as in both.

These are the formulas of PEFT's ``add_weighted_adapter`` of types ``ties_svd``, ``dare_linear_svd``, ``dare_ties_svd``
and ``magnitude_prune_svd``, before its SVD, but for three things. A negative weight turns its member round before signs
are elected: PEFT elects among members that it then adds with the other sign. Entries that equal the smallest kept one
are kept too, so that no order of memory decides. And what DARE drops follows from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.delta import Delta

BLOCK = 1 << 16
"""Entries of one block of rows: a block of each of a few members stays in a core's cache."""


@dataclass(frozen=True)
class Operator:
    """What is done to each member, and how members become one.

    Args:
        prunes: ``magnitude``, ``random`` or nothing.
        elects: signs are elected and the members that agree averaged; otherwise the members are added.
        normalized: weights are divided by their sum.
    """

    name: str
    prunes: str = ""
    elects: bool = False
    normalized: bool = False

    @property
    def linear(self) -> bool:
        """A sum of the deltas: low-rank members give a low-rank result, exactly."""
        return not self.prunes


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("sum"),
        Operator("average", normalized=True),
        Operator("ties", "magnitude", elects=True),
        Operator("dare", "random"),
        Operator("dare-ties", "random", elects=True),
        Operator("magnitude", "magnitude"),
    )
}


@dataclass(frozen=True)
class Member:
    """One delta at one site: its weight, and the generator of what is dropped at random."""

    weight: float
    delta: Delta
    generator: torch.Generator | None = None


def operator_named(name: str, density: float | None) -> Operator:
    """The operator `name`, with a density that it can take.

    Raises:
        HubkitError: ``HK-OPERATOR`` for another name; ``HK-DENSITY`` for one that is missing, not in (0, 1], or given
            to an operator that keeps every entry.
    """
    if name not in OPERATORS:
        raise HubkitError(
            "HK-OPERATOR",
            f"there is no way to compose called {name!r}",
            want=", ".join(OPERATORS),
            have=name,
            status=USAGE,
        )
    operator = OPERATORS[name]
    if operator.linear and density is not None:
        pruning = ", ".join(o.name for o in OPERATORS.values() if o.prunes)
        raise HubkitError(
            "HK-DENSITY",
            f"{name} keeps every entry: it takes no density",
            want=f"a density for {pruning}",
            have=str(density),
            status=USAGE,
        )
    if operator.prunes and (density is None or not 0 < density <= 1):
        raise HubkitError(
            "HK-DENSITY",
            f"{name} needs the part of the entries to keep",
            want="0 < density <= 1",
            have="none" if density is None else str(density),
            fix="--density 0.2",
            status=USAGE,
        )
    return operator


def normalized(operator: Operator, weights: Sequence[float]) -> list[float]:
    """The weights that an operator uses.

    Raises:
        HubkitError: ``HK-OPERATOR`` when an average's weights add up to nothing.
    """
    if not operator.normalized:
        return list(weights)
    total = sum(weights)
    if abs(total) <= 1e-6 * sum(map(abs, weights)):
        raise HubkitError(
            "HK-OPERATOR",
            "the weights of an average add up to nothing",
            want="a sum of weights that is not zero",
            have=" ".join(f"{w:+g}" for w in weights),
            fix="--method sum",
            status=USAGE,
        )
    return [weight / total for weight in weights]


def combine(operator: Operator, members: Sequence[Member], density: float | None = None) -> Tensor:
    """What a pruning operator makes of the members' deltas: a dense (out, in) matrix in their dtype.

    Works on blocks of rows; of the members one dense delta at a time exists, and only where entries are ranked.

    Args:
        members: deltas of one site, without biases.
        density: d, in (0, 1].
    """
    assert operator.prunes
    assert density is not None
    rows_of = [_rows(member.delta) for member in members]
    shape, dtype = rows_of[0].shape, rows_of[0].dtype
    ranked = operator.prunes == "magnitude" and density < 1
    limits = [_largest_left_out(rows, density) if ranked else None for rows in rows_of]
    step = max(1, BLOCK // max(1, shape[1]))
    out = torch.zeros(shape, dtype=dtype)
    weights = torch.tensor([member.weight for member in members], dtype=dtype)
    stack = torch.empty(len(members), step, shape[1], dtype=dtype)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        blocks = stack if stop - start == step else stack[:, : stop - start].contiguous()
        for block, member, rows, limit in zip(blocks, members, rows_of, limits, strict=True):
            rows.read(start, stop, block)
            if limit is not None:
                torch.hardshrink(block, limit, out=block)
            if member.generator is not None:
                _drop(block, density, member.generator)
        flat, target = blocks.view(len(members), -1), out[start:stop].view(-1)
        if operator.elects:
            _elected_mean(flat, weights, target)
        else:
            torch.mv(flat.t(), weights, out=target)
    return out


def _elected_mean(members: Tensor, weights: Tensor, out: Tensor) -> None:
    """Writes the weighted mean of the members that have the elected sign, entry by entry.

    Args:
        members: (m, n), overwritten.
        weights: (m,).
        out: (n,).
    """
    for member, weight in zip(members, weights.tolist(), strict=True):
        if weight < 0:
            member.neg_()
    every = torch.ones_like(weights)
    total = torch.mv(members.t(), every).add_(0.0)  # -0 + 0 is +0: elects +1
    elected = torch.copysign(torch.ones_like(out), total)
    members.mul_(elected).relu_()
    torch.mv(members.t(), weights.abs(), out=out)
    count = torch.mv(members.sign_().t(), every, out=total)
    out.div_(count.clamp_min_(1)).mul_(elected)


def _drop(block: Tensor, density: float, generator: torch.Generator) -> None:
    if density < 1:
        chances = torch.rand(block.shape, generator=generator, dtype=torch.float32)
        block.mul_(chances < density).div_(density)


@dataclass(frozen=True)
class _Rows:
    """A delta by blocks of rows: `read` writes rows start to stop into a tensor."""

    shape: tuple[int, int]
    dtype: torch.dtype
    read: Callable[[int, int, Tensor], object]


def _rows(delta: Delta) -> _Rows:
    left, right, dense = delta.left, delta.right, delta.dense
    if left is None or right is None:
        assert dense is not None
        whole = dense
        return _Rows((whole.shape[0], whole.shape[1]), whole.dtype, lambda i, j, out: out.copy_(whole[i:j]))

    def read(start: int, stop: int, out: Tensor) -> None:
        torch.mm(left[start:stop], right, out=out)
        if dense is not None:
            out.add_(dense[start:stop])

    return _Rows((left.shape[0], right.shape[1]), left.dtype, read)


def _largest_left_out(rows: _Rows, density: float) -> float:
    """The number just below the magnitude of the smallest of the d·n largest entries; at least one entry is kept."""
    count = rows.shape[0] * rows.shape[1]
    keep = max(1, int(density * count))
    whole = torch.empty(rows.shape, dtype=rows.dtype)
    step = max(1, BLOCK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):  # the same blocks as later: the same bits
        stop = min(start + step, rows.shape[0])
        rows.read(start, stop, whole[start:stop])
    values = whole.abs_().view(-1).numpy()
    values.partition(count - keep)
    smallest = values[count - keep]
    return float(np.nextafter(smallest, smallest.dtype.type(0)))
