"""The attention of short rows: taken where it is faster, left again, and torch's own up to rounding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.training.attention import LONGEST, MOST_KEYS, short_attention

HALF = nn.Linear(2, 2).to(torch.bfloat16)


def node(dtype: torch.dtype, longest: int, enabled: bool = True, **arguments: Any) -> str:
    """The name of what autograd will run backward for one call of attention."""
    q = torch.ones(1, 2, longest, 4, dtype=dtype, requires_grad=True)
    with short_attention(nn.Linear(2, 2).to(dtype), enabled):
        return str(F.scaled_dot_product_attention(q, q, q, **arguments).grad_fn)


@pytest.mark.parametrize(
    ("dtype", "longest", "enabled", "arguments", "taken"),
    [
        (torch.bfloat16, LONGEST, True, {}, True),
        (torch.float16, 8, True, {"is_causal": True}, True),
        (torch.bfloat16, LONGEST + 1, True, {}, False),
        (torch.bfloat16, 8, False, {}, False),
        (torch.float32, 8, True, {}, False),
        (torch.bfloat16, 8, True, {"dropout_p": 0.1}, False),
        (torch.bfloat16, 1, True, {}, False),
    ],
)
def test_it_is_taken_for_short_rows_in_half_precision(
    dtype: torch.dtype, longest: int, enabled: bool, arguments: dict[str, Any], taken: bool
) -> None:
    assert node(dtype, longest, enabled, **arguments).startswith("<torch.autograd.function._AttentionBackward") is taken
    assert "_AttentionBackward" not in node(dtype, longest, False, **arguments)


@pytest.mark.parametrize(("keys", "taken"), [(LONGEST + 20, True), (MOST_KEYS, True), (MOST_KEYS + 1, False)])
def test_keys_in_front_of_the_text_are_few_enough(keys: int, taken: bool) -> None:
    q = torch.ones(1, 2, LONGEST, 4, dtype=torch.bfloat16, requires_grad=True)
    k = torch.ones(1, 2, keys, 4, dtype=torch.bfloat16)
    mask = torch.ones(LONGEST, keys, dtype=torch.bool).tril(keys - LONGEST)
    with short_attention(HALF):
        found = str(F.scaled_dot_product_attention(q, k, k, mask).grad_fn)
    assert ("_AttentionBackward" in found) is taken


def masks() -> dict[str, dict[str, Any]]:
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    padded = causal.expand(2, 1, 9, 9).clone()
    padded[1, :, :, :2] = False  # left padding: the first two rows of it may see nothing
    window = (causal & ~torch.ones(9, 9, dtype=torch.bool).tril(-4))[None, None]
    return {
        "all": {},
        "causal": {"is_causal": True, "scale": 0.3},
        "padded": {"attn_mask": padded},
        "window": {"attn_mask": window},
        "added": {"attn_mask": torch.zeros(2, 1, 9, 9).masked_fill(~padded, float("-inf"))},
    }


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("key_heads", [6, 2])
def test_it_computes_the_same_forward_and_backward(name: str, key_heads: int) -> None:
    """As torch's own in fp64, within a few roundings to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 9, 8), (2, key_heads, 9, 8), (2, key_heads, 9, 8))
    inputs = [torch.randn(shape, generator=generator).to(torch.bfloat16).requires_grad_() for shape in shapes]
    grad = torch.randn(2, 6, 9, 8, generator=generator).to(torch.bfloat16)

    def run(tensors: list[Tensor]) -> list[Tensor]:
        arguments = masks()[name]
        if "attn_mask" in arguments and arguments["attn_mask"].is_floating_point():
            arguments["attn_mask"] = arguments["attn_mask"].to(tensors[0].dtype)
        out = F.scaled_dot_product_attention(*tensors, enable_gqa=True, **arguments)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    want = run([tensor.detach().double().requires_grad_() for tensor in inputs])
    with short_attention(HALF):
        have = run(inputs)
    for one, other in zip(have, want, strict=True):
        assert (one.double() - other).abs().max() <= 2**-6 * other.abs().max()


def test_checkpointed_layers_are_computed_again_in_the_same_way() -> None:
    """Non-reentrant checkpointing compares what is saved: another attention in the backward pass would be refused."""
    from hubkit.methods.suite import batch, tiny_model

    grads = []
    for checkpointing in (False, True):
        model: Any = tiny_model("llama").to(torch.bfloat16).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with short_attention(model):
            model(input_ids=batch(), labels=batch()).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_other_threads_and_what_follows_have_torchs_own() -> None:
    original = F.scaled_dot_product_attention
    q = torch.ones(1, 2, 4, 4, dtype=torch.bfloat16, requires_grad=True)

    def taken() -> bool:
        return "_AttentionBackward" in str(F.scaled_dot_product_attention(q, q, q).grad_fn)

    with ThreadPoolExecutor(1) as pool, short_attention(HALF):
        with short_attention(HALF):
            assert not pool.submit(taken).result()
        assert taken()
    assert F.scaled_dot_product_attention is original


def test_a_shape_that_torch_refuses_is_refused_as_torch_does() -> None:
    q, k = torch.ones(1, 6, 4, 8, dtype=torch.bfloat16), torch.ones(1, 4, 4, 8, dtype=torch.bfloat16)
    with short_attention(HALF), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k, k)
