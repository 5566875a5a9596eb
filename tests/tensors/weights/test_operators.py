"""Operators on true deltas, beside PEFT's own functions on the same matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from variants import refused

from hubkit.tensors.base.delta import Delta
from hubkit.tensors.seed import generator_for
from hubkit.tensors.weights import operators
from hubkit.tensors.weights.operators import OPERATORS, Member, combine, normalized, operator_named

ROUNDED = 1e-6
"""Largest difference, relative to the largest entry, of a few fp32 additions in another order."""


def deltas(shape: tuple[int, int] = (24, 40), count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * (i + 1) for i in range(count)]


def members(matrices: list[Tensor], weights: tuple[float, ...]) -> list[Member]:
    return [Member(weight, Delta.full(m)) for m, weight in zip(matrices, weights, strict=True)]


def near(have: Tensor, want: Tensor) -> None:
    assert (have - want).abs().max() <= ROUNDED * want.abs().max()


@pytest.mark.parametrize("block", [1, 100, 1 << 16])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, 2.0, 1.5)])
@pytest.mark.filterwarnings("ignore:The density")
def test_they_are_pefts(
    weights: tuple[float, ...], density: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.utils import merge_utils

    monkeypatch.setattr(operators, "BLOCK", block)
    matrices = deltas((40, 60))
    for name, theirs in (("ties", merge_utils.ties), ("magnitude", merge_utils.magnitude_prune)):
        have = combine(OPERATORS[name], members(matrices, weights), density)
        near(have, theirs([m.clone() for m in matrices], torch.tensor(weights), density))
    dropped = [
        m * (torch.rand(m.shape, generator=generator_for(1, str(i))) < density) / density
        for i, m in enumerate(matrices)
    ]
    drawn = [
        Member(w, Delta.full(m), generator_for(1, str(i)))
        for i, (w, m) in enumerate(zip(weights, matrices, strict=True))
    ]
    near(combine(OPERATORS["dare"], drawn, density), merge_utils.task_arithmetic(dropped, torch.tensor(weights)))
    drawn = [
        Member(w, Delta.full(m), generator_for(1, str(i)))
        for i, (w, m) in enumerate(zip(weights, matrices, strict=True))
    ]
    near(combine(OPERATORS["dare-ties"], drawn, density), merge_utils.ties(dropped, torch.tensor(weights), 1.0))


@pytest.mark.parametrize("name", ["magnitude", "dare"])
def test_negative_weights_are_pefts_where_nothing_is_elected(name: str) -> None:
    from peft.utils import merge_utils

    matrices, weights = deltas(), (1.0, -0.5, 2.0)
    if name == "magnitude":
        near(
            combine(OPERATORS[name], members(matrices, weights), 0.3),
            merge_utils.magnitude_prune(matrices, torch.tensor(weights), 0.3),
        )
    else:
        near(
            combine(OPERATORS[name], members(matrices, weights), 1.0),
            merge_utils.task_arithmetic(matrices, torch.tensor(weights)),
        )


@pytest.mark.parametrize("name", ["ties", "dare-ties"])
def test_a_negative_weight_is_the_negated_member(name: str) -> None:
    """The election sees what is added; PEFT elects first and turns round afterwards."""
    matrices = deltas()
    turned = [matrices[0], -matrices[1], matrices[2]]
    have = combine(OPERATORS[name], members(matrices, (1.0, -0.5, 2.0)), 1.0)
    assert torch.equal(have, combine(OPERATORS[name], members(turned, (1.0, 0.5, 2.0)), 1.0))


def test_factors_are_the_matrix() -> None:
    """Factors of any rank, with a dense addend or not, are pruned as the matrix they stand for."""
    generator = torch.Generator().manual_seed(0)
    factored = [
        Delta(torch.randn(30, r, generator=generator), torch.randn(r, 50, generator=generator), dense)
        for r, dense in ((4, None), (7, torch.randn(30, 50, generator=generator)), (2, None))
    ]
    whole = [Delta.full(delta.matrix()) for delta in factored]
    for name in ("ties", "magnitude"):
        have, want = (combine(OPERATORS[name], [Member(1.0, d) for d in ds], 0.4) for ds in (factored, whole))
        assert (have - want).abs().max() <= 1e-5 * want.abs().max()


def test_equal_entries_stay_together() -> None:
    """No order of memory decides which of equals is kept; nothing at all stays nothing."""
    flat = torch.full((4, 6), 2.0)
    assert torch.equal(combine(OPERATORS["magnitude"], members([flat], (1.0,)), 0.25), flat)
    zero = torch.zeros(4, 6)
    for name in ("ties", "magnitude"):
        assert not combine(OPERATORS[name], members([zero, -zero], (1.0, -1.0)), 0.5).any()


def test_dropping_keeps_the_mean_and_follows_the_seed() -> None:
    matrix = torch.ones(50, 60)

    def run(seed: int) -> Tensor:
        return combine(OPERATORS["dare"], [Member(1.0, Delta.full(matrix), generator_for(seed, "site", "a"))], 0.25)

    assert set(run(0).flatten().tolist()) == {0.0, 4.0}
    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    mean = torch.stack([run(seed) for seed in range(40)]).mean()
    assert mean == pytest.approx(1.0, abs=0.03)  # 120000 draws: five standard deviations
    assert not torch.equal(
        torch.rand(9, generator=generator_for(0, "a", "b")), torch.rand(9, generator=generator_for(0, "ab", ""))
    )


def test_an_average_is_divided_by_the_weights() -> None:
    assert normalized(OPERATORS["average"], [1.0, 3.0]) == [0.25, 0.75]
    assert normalized(OPERATORS["average"], [2.0, -1.0]) == [2.0, -1.0]
    assert normalized(OPERATORS["sum"], [1.0, 3.0]) == [1.0, 3.0]
    refused("HK-OPERATOR", normalized, OPERATORS["average"], [1.0, -1.0])


@pytest.mark.parametrize("density", [None, 0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_densities(density: float | None) -> None:
    for name in ("ties", "dare", "dare-ties", "magnitude"):
        assert "0 < density <= 1" in refused("HK-DENSITY", operator_named, name, density).want[0]
        operator_named(name, 1.0)
    refused("HK-DENSITY", operator_named, "sum", 0.5)
    refused("HK-OPERATOR", operator_named, "soup", 0.5)
