"""The plain attention of short rows: taken where it is faster, left again, and the same up to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubkit.training.attention import LONGEST, short_attention


@pytest.mark.parametrize(
    ("dtype", "longest", "enabled", "active"),
    [
        (torch.bfloat16, LONGEST, True, True),
        (torch.bfloat16, LONGEST + 1, True, False),
        (torch.bfloat16, 8, False, False),
        (torch.float32, 8, True, False),
    ],
)
def test_it_is_taken_for_short_rows_in_half_precision(
    dtype: torch.dtype, longest: int, enabled: bool, active: bool
) -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with short_attention(nn.Linear(2, 2).to(dtype), longest, enabled) as taken:
        assert taken is active
        assert torch.backends.cuda.flash_sdp_enabled() is (before and not active)
    assert torch.backends.cuda.flash_sdp_enabled() is before


@pytest.mark.parametrize("masked", [True, False])
def test_it_computes_the_same(masked: bool) -> None:
    """Causal, and with a mask that hides the first two keys of one row, as left padding does."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=generator).to(torch.bfloat16) for _ in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9).clone()
    mask[1, :, 2:, :2] = False
    arguments = {"attn_mask": mask} if masked else {"is_causal": True}
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **arguments)
    with short_attention(nn.Linear(2, 2).to(torch.bfloat16), 9):
        have = F.scaled_dot_product_attention(q, k, v, **arguments)
    assert (have.double() - want).abs().max() <= 2**-6 * want.abs().max()
