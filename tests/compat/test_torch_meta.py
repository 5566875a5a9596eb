"""Tensors without contents have the values that follow from shapes, and nothing else has any."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hubkit.compat.torch_meta import Followed, attention_by_products, fuses_attention


def meta(values: Tensor, followed: Followed) -> Tensor:
    return followed.give(torch.empty(values.shape, dtype=values.dtype, device="meta"), values)


def test_values_follow_through_operations_views_and_changes_in_place() -> None:
    with Followed() as followed:
        ids = meta(torch.tensor([[1, 0, 2], [0, 3, 0]]), followed)
        mask = ids[:, 1:] > 0
        mask[0, 0] = True
        assert mask.device.type == "meta"
        assert mask.nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]
        assert bool(mask.any())
        assert int(ids.sum()) == 6
        positions = torch.arange(4, device="meta")
        positions.view(2, 2)[1].fill_(7)
        assert positions.tolist() == [0, 1, 7, 7]
        assert torch.full((2,), 3.0, device="meta").tolist() == [3.0, 3.0]
        assert ids[ids > 0].shape == (3,)
        assert torch.randn(2, 3, device="meta")[ids > 0].shape == (3,)
        assert ids.repeat_interleave(meta(torch.tensor([1, 0, 2]), followed), dim=1).shape == (2, 3)


@pytest.mark.parametrize("number", [4, 6])
def test_what_is_chosen_by_numbers_that_are_not_there_is_chosen_evenly(number: int) -> None:
    with Followed():
        chosen = torch.randn(3, 8, number, device="meta").topk(2, dim=-1).indices
        places = F.one_hot(chosen, number).sum((0, 1, 2))
        assert set(places.tolist()) == {3 * 8 * 2 // number}
        assert bool((chosen[..., 0] != chosen[..., 1]).all())
        assert torch.randn(5, 4, device="meta").argmax(-1).tolist() == [0, 1, 2, 3, 0]
        assert torch.randn(5, 4, device="meta").max(0).indices.shape == (4,)


def test_other_values_are_not_there() -> None:
    with Followed():
        unknown = torch.randn(3, device="meta")
        known = torch.zeros(3, device="meta")
        assert known.tolist() == [0.0, 0.0, 0.0]
        known.add_(unknown)
        for asks in (lambda: unknown.sum().item(), lambda: (unknown > 0).nonzero(), known.tolist):
            with pytest.raises((RuntimeError, NotImplementedError)):
                asks()
    with pytest.raises(RuntimeError):
        torch.zeros(3, device="meta").sum().item()


def test_other_devices_are_left_alone() -> None:
    with Followed():
        made = torch.randn(4, 4).topk(2)
        assert made.values.shape == (4, 2)
        assert made.values.device.type == "cpu"


@pytest.mark.parametrize(("dropout", "width"), [(0.0, 8), (0.5, 8), (0.0, 4)])
def test_torch_says_whether_it_fuses_an_attention(dropout: float, width: int) -> None:
    """On a CPU not with dropout, nor values of another width than keys: then it multiplies, as here."""
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, width)
    asked = None, dropout, True, None, False
    assert fuses_attention("cpu", query, key, value, *asked) == (dropout == 0 and width == 8)
    assert fuses_attention("cuda", query, key, value, *asked)
    if not dropout:
        want = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert torch.allclose(attention_by_products(query, key, value, *asked), want, atol=1e-5)
