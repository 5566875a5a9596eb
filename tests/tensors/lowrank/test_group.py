"""A handful of half-precision rows takes another way through the products: it must compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hubkit.tensors.base.site import Site
from hubkit.tensors.lowrank.group import FEW, Group, SiteParts, add_low_rank
from hubkit.tensors.parts.part import LowRank

SITE = Site("site", "linear", (24, 40), torch.bfloat16, False, "site.weight", None)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("scale", [2.0, 1.7, -0.5])
@pytest.mark.parametrize("count", [1, 2])
def test_few_rows_compute_what_many_do(rows: int, scale: float, count: int) -> None:
    """Against the plain formula in fp64; the tolerance is bf16's own: 2^-8 of the largest value."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(count):
        part = LowRank(SITE, 4, scale)
        for factor in (part.A, part.B):
            factor.data = torch.randn(factor.shape, generator=generator).to(torch.bfloat16)
            factor.requires_grad_(False)
        parts.append((part, 0.5))
    linear = nn.Linear(40, 24, bias=False).to(torch.bfloat16)
    group = Group({"site": SiteParts(parts)})
    linear.register_forward_hook(lambda module, args, y: add_low_rank(group, "site", module, args[0], y))
    x = torch.randn(rows, 1, 40, generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        have = linear(x).double()
        weight = linear.weight.double() + sum(0.5 * scale * p.B.double() @ p.A.double() for p, _ in parts)
        want = x.double() @ weight.t()
    assert (have - want).abs().max() <= 2**-6 * want.abs().max()


def test_a_changed_frozen_factor_is_seen() -> None:
    part = LowRank(SITE, 4, 1.0)
    for factor in (part.A, part.B):
        factor.data = torch.ones(factor.shape, dtype=torch.bfloat16)
        factor.requires_grad_(False)
    group, linear = Group({"site": SiteParts([(part, 1.0)])}), nn.Linear(40, 24, bias=False).to(torch.bfloat16)
    x = torch.ones(2, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        first = add_low_rank(group, "site", linear, x, torch.zeros(2, 24, dtype=torch.bfloat16))
        part.B.mul_(2)
        again = add_low_rank(group, "site", linear, x.clone(), torch.zeros(2, 24, dtype=torch.bfloat16))
    assert torch.equal(again, 2 * first)


def test_few_rows_of_a_module_whose_output_is_no_block_of_memory() -> None:
    part = LowRank(SITE, 4, 1.0)
    for factor in (part.A, part.B):
        factor.data = torch.ones(factor.shape, dtype=torch.bfloat16)
        factor.requires_grad_(False)
    group = Group({"site": SiteParts([(part, 1.0)])})
    y = torch.zeros(24, 3, 2, dtype=torch.bfloat16).permute(2, 1, 0)
    with torch.no_grad():
        have = add_low_rank(group, "site", nn.Identity(), torch.ones(2, 3, 40, dtype=torch.bfloat16), y)
    assert torch.equal(have, torch.full((2, 3, 24), 160.0, dtype=torch.bfloat16))
    assert not y.any()
