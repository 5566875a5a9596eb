"""What is said of two deltas, beside what torch says of the whole matrices and of the principal angles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from variants import refused

from hubkit.tensors.base.delta import Delta
from hubkit.tensors.base.site import Site
from hubkit.tensors.weights.interference import STRONG, Interference, PairAt, interference

OUT, IN = 30, 40


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low(rank: int, seed: int) -> Delta:
    return Delta.low_rank(random(OUT, rank, seed=seed), random(rank, IN, seed=seed + 100))


def whole(delta: Delta) -> Tensor:
    matrix = delta.matrix()
    assert matrix is not None
    return matrix


def between(*deltas: Delta | None, weights: tuple[float, ...] = (1.0, 1.0)) -> Interference:
    site = Site("model.layers.0.q_proj", "linear", (OUT, IN), torch.float32, False, "w", None)
    named = dict(zip("abc", deltas, strict=False))
    return interference([site], list(zip(named, weights, strict=False)), lambda name, _: named[name])


def at(found: Interference) -> PairAt:
    return found.pairs[0].sites[0]


def test_two_copies() -> None:
    one = low(4, 1)
    found = at(between(one, one))
    assert (found.columns, found.rows, found.cosine) == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)
    assert found.conflict == 0.0
    assert between(one, one).advice == "ties"
    assert between(one, one, weights=(1.0, -1.0)).advice == "keep separate"
    assert at(between(one, one, weights=(1.0, -2.0))).conflict == 1.0
    assert at(between(one, one, weights=(1.0, -2.0))).norms[1] == pytest.approx(2 * found.norms[0])


def test_disjoint_columns() -> None:
    a, b = low(4, 1), low(4, 2)
    assert a.left is not None
    assert b.left is not None
    a.left[15:], b.left[:15] = 0, 0
    found = between(a, b)
    assert at(found).columns == pytest.approx(0.0, abs=1e-12)
    assert at(found).cosine == pytest.approx(0.0, abs=1e-12)
    assert at(found).conflict is None, "no entry is large in both"
    assert found.advice == "sum"


@pytest.mark.parametrize("ranks", [(4, 4), (3, 8)])
def test_figures_are_those_of_the_whole_matrices(ranks: tuple[int, int]) -> None:
    a, b = low(ranks[0], 1), low(ranks[1], 2)
    found = at(between(a, b, weights=(0.5, -2.0)))
    x, y = (0.5 * whole(a)).double(), (-2.0 * whole(b)).double()
    assert found.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-5)
    assert found.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
    for have, p, q in ((found.columns, x, y), (found.rows, x.t(), y.t())):
        u = torch.linalg.svd(p)[0][:, : ranks[0]]
        v = torch.linalg.svd(q)[0][:, : ranks[1]]
        angles = torch.linalg.svdvals(u.t() @ v)
        assert have == pytest.approx(float(angles.square().mean()), abs=1e-5)
    large = [m.abs() >= m.abs().flatten().topk(int(STRONG * m.numel()))[0][-1] for m in (x, y)]
    both = large[0] & large[1]
    assert found.conflict == pytest.approx(float((x * y < 0)[both].double().mean()), abs=0.02)


def test_chance_is_what_random_subspaces_give() -> None:
    figures = [at(between(low(4, seed), low(6, 50 + seed))) for seed in range(30)]
    chance = figures[0].chance
    assert chance is not None
    assert chance == pytest.approx((6 / OUT, 6 / IN))
    assert sum(f.columns or 0 for f in figures) / 30 == pytest.approx(chance[0], rel=0.15)
    assert sum(f.rows or 0 for f in figures) / 30 == pytest.approx(chance[1], rel=0.15)


def test_rank_is_that_of_the_delta_not_of_the_factors() -> None:
    a = low(4, 1)
    twice = Delta.low_rank(torch.cat([a.left, a.left], 1), torch.cat([a.right, a.right]))  # type: ignore[list-item]
    assert at(between(a, twice)).columns == pytest.approx(1.0, abs=1e-6)


def test_zeros_dense_and_absent() -> None:
    a, zero = low(4, 1), Delta.low_rank(torch.zeros(OUT, 2), random(2, IN, seed=3))
    found = at(between(a, zero))
    assert (found.columns, found.rows, found.cosine, found.conflict) == (None, None, None, None)
    dense = at(between(a, Delta.full(a.matrix())))
    assert dense.columns is None
    assert dense.cosine == pytest.approx(1.0, abs=1e-6)
    alone = between(a, None)
    assert (alone.pairs[0].sites, alone.advice) == ((), "sum")
    three = between(a, low(4, 2), a, weights=(1.0, 1.0, 1.0))
    assert [pair.members for pair in three.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert three.advice == "ties"
    assert three.reason.startswith("a and c: ")


def test_same_directions_with_other_signs() -> None:
    """One space, other values in it: TIES has something to elect."""
    left, right = random(OUT, 4, seed=1), random(4, IN, seed=2)
    turn = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    found = between(Delta.low_rank(left, right), Delta.low_rank(left @ turn, right))
    assert found.pairs[0].columns == pytest.approx(1.0, abs=1e-6)
    assert found.advice == "ties"
    assert "sign conflict" in found.reason


def test_one_member() -> None:
    refused("HK-REPORT", interference, [], [("a", 1.0)], lambda name, site: None)
