"""What is added to a weight: linear, exact where it can be, and the same bits however it is cut into tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.tensors.base import delta as module
from hubkit.tensors.base.delta import Delta, apply_bias, apply_weight

OUT, IN = 12, 20
SEEDS = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas(seed: int, dtype: torch.dtype = torch.float64) -> list[Delta]:
    """One of each form."""
    left, right, dense, bias = (
        random(seed + n, *s).to(dtype) for n, s in enumerate([(OUT, 3), (3, IN), (OUT, IN), (OUT,)])
    )
    return [
        Delta(),
        Delta.low_rank(left, right),
        Delta.full(dense),
        Delta.full(bias=bias),
        Delta(left, right, dense, bias),
    ]


def dense(delta: Delta) -> torch.Tensor:
    matrix = delta.matrix()
    return torch.zeros(OUT, IN, dtype=torch.float64) if matrix is None else matrix


def bias(delta: Delta) -> torch.Tensor:
    return torch.zeros(OUT, dtype=torch.float64) if delta.bias is None else delta.bias


@given(SEEDS, st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_scaled_and_plus_are_linear(seed: int, a: float, b: float) -> None:
    for one in deltas(seed):
        for two in deltas(seed + 10):
            both = one.scaled(a).plus(two.scaled(b))
            assert torch.allclose(dense(both), a * dense(one) + b * dense(two), atol=1e-12)
            assert torch.allclose(bias(both), a * bias(one) + b * bias(two), atol=1e-12)
            assert both.fits((OUT, IN))
            assert one.plus(two).is_low_rank == (one.is_low_rank and two.is_low_rank)


def test_factors_stay_factors() -> None:
    low = deltas(0)[1]
    both = low.plus(low.scaled(-0.5))
    assert both.left is not None
    assert both.left.shape == (OUT, 6)
    assert both.dense is None
    assert low.scaled(1.0) is low


@pytest.mark.parametrize(
    "wrong",
    [
        Delta.full(torch.zeros(1, IN)),
        Delta.full(torch.zeros(OUT)),
        Delta.full(bias=torch.zeros(1)),
        Delta.low_rank(torch.zeros(OUT, 2), torch.zeros(3, IN)),
        Delta(left=torch.zeros(OUT, 2)),
        Delta.full(torch.zeros(IN, OUT)),
        Delta.low_rank(torch.zeros(OUT), torch.zeros(IN)),
    ],
)
def test_what_would_be_broadcast_does_not_fit(wrong: Delta) -> None:
    assert not wrong.fits((OUT, IN))
    assert "(" in wrong.describe()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", range(5))
def test_applied_it_is_weight_plus_matrix(dtype: torch.dtype, transposed: bool, form: int) -> None:
    change = deltas(7, torch.float64 if dtype == torch.float64 else torch.float32)[form]
    weight = random(3, OUT, IN).to(dtype)
    stored = weight.t().contiguous() if transposed else weight
    have = apply_weight(stored, change, transposed=transposed)
    want = weight.double() + dense(change).double()
    assert have.dtype == dtype
    assert torch.allclose(
        have.t().double() if transposed else have.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5
    )
    wide = apply_weight(stored, change, transposed=transposed, dtype=torch.float64)
    assert torch.allclose(wide.t() if transposed else wide, want, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", [1, 2, 4])
def test_the_size_of_the_tiles_does_not_matter(transposed: bool, form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit where nothing is multiplied; a product rounds as the BLAS likes at a tile's edges, so the size of
    tiles is one constant, for files and models alike."""
    weight = random(3, 512, 64).float()
    low = Delta.low_rank(random(1, 512, 8).float(), random(2, 8, 64).float())
    full = Delta.full(random(4, 512, 64).float())
    change = {1: low, 2: full, 4: low.plus(full)}[form]
    stored = weight.t().contiguous() if transposed else weight
    whole = apply_weight(stored, change, transposed=transposed)
    for rows in (1, 7, 16, 500):
        monkeypatch.setattr(module, "TILE_ELEMENTS", rows * stored.shape[1])
        cut = apply_weight(stored, change, transposed=transposed)
        assert torch.equal(cut, whole) if form == 2 else torch.allclose(cut, whole, rtol=0, atol=4e-6)
        assert torch.equal(apply_weight(stored, change, transposed=transposed), cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [1, 2, 4])
def test_the_layout_of_the_stored_weight_does_not_matter(dtype: torch.dtype, form: int) -> None:
    """The same bits for a weight in rows, a transposed view, every second column, and one that is not aligned."""
    weight = random(3, 96, 80).to(dtype)
    low = Delta.low_rank(random(1, 96, 7).float(), random(2, 7, 80).float())
    full = Delta.full(random(4, 96, 80).float())
    change = {1: low, 2: full, 4: low.plus(full)}[form]
    want = apply_weight(weight, change, transposed=False)
    wider, shifted = torch.zeros(96, 160, dtype=dtype), torch.zeros(96 * 80 + 1, dtype=dtype)[1:].view(96, 80)
    wider[:, ::2], shifted[:] = weight, weight
    for same in (weight.t().contiguous().t(), wider[:, ::2], shifted):
        assert torch.equal(same, weight)
        assert torch.equal(apply_weight(same, change, transposed=False), want)
        across = apply_weight(weight.t().contiguous(), change, transposed=True)
        assert torch.equal(apply_weight(same.t(), change, transposed=True), across)


def test_the_stored_weight_is_left_alone_and_one_cast_is_made() -> None:
    weight = torch.full((4, 4), 256.0, dtype=torch.bfloat16)
    change = Delta.full(torch.full((4, 4), 0.75)).plus(Delta.full(torch.full((4, 4), 0.75)))
    merged = apply_weight(weight, change, transposed=False)
    assert torch.equal(weight, torch.full((4, 4), 256.0, dtype=torch.bfloat16))
    assert torch.equal(merged, torch.full((4, 4), 258.0, dtype=torch.bfloat16))  # 257.5; each alone would be lost


def test_biases() -> None:
    stored = random(5, OUT).to(torch.bfloat16)
    change = Delta.full(bias=random(6, OUT).float())
    assert torch.equal(apply_bias(stored, Delta()), stored)
    assert torch.equal(apply_bias(stored, change), (stored.float() + bias(change)).to(torch.bfloat16))
    assert apply_bias(stored, change, dtype=torch.float32).dtype == torch.float32
