"""The attention of short rows: taken where it is faster, left again, and torch's own up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ids, model_of

from hubkit.tensors.front.decoder_hooks import SHORT_ROWS
from hubkit.training.attention import LONGEST, MOST_KEYS, attend, short_attention


def otherwise(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Stands for transformers' own, so that tests see whether it was called."""
    return torch.zeros_like(query.transpose(1, 2)), None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    **others: Any,
) -> Tensor:
    """`attend`, called as torch's function is; the layout of its result is torch's."""
    out, _ = attend(otherwise, nn.Identity(), query, key, value, attn_mask, dropout_p, scale, is_causal, **others)
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    ("dtype", "longest", "arguments", "taken"),
    [
        (torch.bfloat16, LONGEST, {}, True),
        (torch.float16, 8, {"is_causal": True}, True),
        (torch.bfloat16, LONGEST + 1, {}, False),
        (torch.float32, 8, {}, False),
        (torch.bfloat16, 8, {"dropout_p": 0.1}, False),
        (torch.bfloat16, 8, {"softcap": 30.0}, False),
        (torch.bfloat16, 1, {}, False),
    ],
)
def test_it_is_taken_for_short_rows_in_half_precision(
    dtype: torch.dtype, longest: int, arguments: dict[str, Any], taken: bool
) -> None:
    q = torch.ones(1, 2, longest, 4, dtype=dtype, requires_grad=True)
    assert bool(attention(q, q, q, **arguments).any()) is taken


@pytest.mark.parametrize(("keys", "taken"), [(LONGEST + 20, True), (MOST_KEYS, True), (MOST_KEYS + 1, False)])
def test_keys_in_front_of_the_text_are_few_enough(keys: int, taken: bool) -> None:
    q = torch.ones(1, 2, LONGEST, 4, dtype=torch.bfloat16, requires_grad=True)
    k = torch.ones(1, 2, keys, 4, dtype=torch.bfloat16)
    mask = torch.ones(LONGEST, keys, dtype=torch.bool).tril(keys - LONGEST)
    assert bool(attention(q, k, k, attn_mask=mask).any()) is taken


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

    def run(function: Any, tensors: list[Tensor], **more: Any) -> list[Tensor]:
        arguments = masks()[name]
        if "attn_mask" in arguments and arguments["attn_mask"].is_floating_point():
            arguments["attn_mask"] = arguments["attn_mask"].to(tensors[0].dtype)
        out = function(*tensors, **arguments, **more)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    want = run(F.scaled_dot_product_attention, exact, enable_gqa=True)
    have = run(attention, inputs)
    for one, other in zip(have, want, strict=True):
        assert (one.double() - other).abs().max() <= 2**-6 * other.abs().max()


def test_checkpointed_layers_are_computed_again_in_the_same_way() -> None:
    """Non-reentrant checkpointing compares what is saved: another attention in the backward pass would be refused."""
    from hubkit.methods.suite import batch, tiny_model

    grads = []
    for checkpointing in (False, True):
        model: Any = tiny_model("llama").to(torch.bfloat16).train()
        model.config.use_cache = False  # with a cache, transformers before 5 lays keys and values out in another way
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with short_attention(model):
            model(input_ids=batch(), labels=batch()).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


KINDS = ("llama", "gpt2", "qwen3", "gemma3_text", "mistral", "phi")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_it_for_a_while_with_its_own_masks(kind: str) -> None:
    """Padding, windows and causality are the model's: a mask that is left out would show."""
    model = model_of(kind, **({"sliding_window": 3} if kind in ("mistral", "gemma3_text") else {}))
    rows, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, -3:] = 0
    exact = model(rows, attention_mask=mask).logits
    model.to(torch.bfloat16)
    with torch.no_grad():
        stock = model(rows, attention_mask=mask).logits.float()
        with short_attention(model) as taken:
            assert taken
            assert model.config._attn_implementation == SHORT_ROWS
            have = model(rows, attention_mask=mask).logits.float()
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(model(rows, attention_mask=mask).logits.float(), stock)
    seen = mask.bool()
    error = (have - exact)[seen].abs().max()
    assert error <= 2 * (stock - exact)[seen].abs().max() + 2**-7 * exact[seen].abs().max()
    assert not torch.equal(have, stock)


@pytest.mark.parametrize(
    ("dtype", "chosen", "enabled"),
    [(torch.bfloat16, "eager", True), (torch.float32, "sdpa", True), (torch.bfloat16, "sdpa", False)],
)
def test_what_it_leaves_alone(dtype: torch.dtype, chosen: str, enabled: bool) -> None:
    model = model_of("llama", chosen).to(dtype)
    with short_attention(model, enabled) as taken:
        assert not taken
        assert model.config._attn_implementation == chosen
    with short_attention(nn.Linear(2, 2).to(torch.bfloat16)) as taken:
        assert not taken


def test_it_is_put_back_after_a_fault_and_torchs_function_is_its_own() -> None:
    original, model = F.scaled_dot_product_attention, model_of("llama").to(torch.bfloat16)
    with short_attention(model):
        assert F.scaled_dot_product_attention is original
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: dict[str, None]()["broken"])
    with pytest.raises(KeyError), short_attention(model):
        model(ids(1, 4))
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
