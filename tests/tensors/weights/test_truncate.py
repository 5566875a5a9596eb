"""The best approximation of a delta, beside the SVD of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hubkit.tensors.weights.truncate import _by_gram, _by_qr, truncate, truncate_dense

EXACT = 1e-5
"""Of fp32 factors, relative to the norm of the best approximation."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors(out: int, rank: int, width: int, decay: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors whose columns fall off to `decay`."""
    steps = torch.linspace(0, 1, rank)
    return random(out, rank) * decay**steps, random(rank, width, seed=1) * (decay**steps)[:, None]


def best(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation by LAPACK, and all squared singular values."""
    u, values, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ vt[:rank], values.square()


@pytest.mark.parametrize("decay", [1.0, 1e-2])
@pytest.mark.parametrize(
    ("out", "rank", "width", "keep"),
    [(40, 12, 64, 4), (64, 12, 40, 12), (16, 24, 20, 5), (20, 24, 16, 30), (8, 1, 8, 1)],
)
def test_it_is_the_best(out: int, rank: int, width: int, keep: int, decay: float) -> None:
    left, right = factors(out, rank, width, decay)
    want, squares = best(left.double() @ right.double(), keep)
    for made in (truncate(left, right, keep), _by_qr(left, right, keep), _by_gram(left, right, keep)):
        if made is None:
            assert rank > width
            continue
        assert torch.linalg.norm(made.left.double() @ made.right.double() - want) <= EXACT * torch.linalg.norm(want)
        assert made.kept == pytest.approx(float(squares[:keep].sum() / squares.sum()), rel=1e-6)
        for less in (1, keep):
            cut, smaller = made.first(less), best(left.double() @ right.double(), less)[0]
            assert torch.linalg.norm(cut.left.double() @ cut.right.double() - smaller) <= EXACT * torch.linalg.norm(
                want
            )


@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-5, 1e-3, 1e-1])
def test_nearly_dependent_rows(apart: float) -> None:
    """The same adapter twice, exactly or nearly: the Gram form gives way to QR before its digits are gone."""
    left, right = factors(30, 12, 50)
    right[6:] = right[:6] + apart * right[6:]
    want, _ = best(left.double() @ right.double(), 4)
    made = truncate(left, right, 4)
    assert torch.linalg.norm(made.left.double() @ made.right.double() - want) <= EXACT * torch.linalg.norm(want)
    assert (_by_gram(left, right, 4) is None) == (apart < 1e-3)


def test_nothing_there() -> None:
    left, right = torch.zeros(9, 4), random(4, 7)
    for made in (truncate(left, right, 2), truncate(left.t().new_zeros(9, 4), right.zero_(), 2)):
        assert not (made.left @ made.right).any()
        assert (made.kept, made.rank_for(0.9)) == (1.0, 1)


def test_the_rank_that_keeps_an_energy() -> None:
    left, right = factors(40, 10, 50, 0.1)
    squares = best(left @ right, 1)[1]
    made = truncate(left, right, 10)
    for energy in (0.1, 0.5, 0.9, 0.99, 1.0):
        rank = made.rank_for(energy)
        assert rank is not None
        assert squares[:rank].sum() >= (energy - 1e-6) * squares.sum()
        assert rank == 1 or squares[: rank - 1].sum() < (energy + 1e-6) * squares.sum()
    assert made.first(2).rank_for(0.999) is None


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (30, 40)])
@pytest.mark.parametrize("decay", [1.0, 0.3])
def test_a_dense_delta(shape: tuple[int, int], decay: float) -> None:
    """Random columns find nearly the best; same seed, same bits."""
    left, right = factors(shape[0], 24, shape[1], decay)
    matrix = left @ right + 0.05 * random(*shape, seed=3)
    want, squares = best(matrix, 8)
    made, again = (truncate_dense(matrix, 8, torch.Generator().manual_seed(5)) for _ in range(2))
    error = torch.linalg.norm(made.left @ made.right - matrix)
    assert error <= 1.005 * torch.linalg.norm(want - matrix)
    assert made.kept == pytest.approx(float(squares[:8].sum() / squares.sum()), rel=1e-2)
    assert torch.equal(made.left, again.left)
    assert torch.equal(made.right, again.right)
    whole = truncate_dense(matrix, min(shape), torch.Generator())
    assert torch.linalg.norm(whole.left @ whole.right - matrix) <= EXACT * torch.linalg.norm(matrix)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_a_dense_sum_is_the_best(shape: tuple[int, int]) -> None:
    matrix = random(*shape, seed=3)
    want, _ = best(matrix, 8)
    made = truncate_dense(matrix, 8, torch.Generator(), whole=96)
    assert torch.linalg.norm(made.left.double() @ made.right.double() - want) <= EXACT * torch.linalg.norm(want)
