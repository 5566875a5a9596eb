"""The chunked loss against transformers' own: same values, same gradients, and hands off where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, Adapted, llama, rows, train_step
from torch import Tensor, nn

from hubkit.training import loss as module
from hubkit.training.loss import ChunkedOutput, chunked_loss, find_head
from hubkit.training.rows.batching import collate

# the same products in chunks of another height may be summed in another order: one rounding of the computing dtype
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
BATCH = collate(rows(6))


def gradients(model: Adapted, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = train_step(model, BATCH)
    torch.autograd.backward(loss * scale)
    found = []
    for param in model.params().values():
        assert param.grad is not None
        found.append(param.grad.flatten())
    return loss.detach(), torch.cat(found)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("chunk", [4, 256])
@pytest.mark.parametrize("tied", [False, True])
def test_values_and_gradients_are_the_stock_ones(
    dtype: torch.dtype, chunk: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    model = Adapted(llama(dtype, tie_word_embeddings=tied))
    scale = 2.0**10 if dtype == torch.float16 else 1.0  # as training does: unscaled, the stock gradient underflows
    stock, expected = gradients(model, scale)
    with chunked_loss(model, BATCH) as active:
        assert active
        loss, found = gradients(model, scale)
        assert isinstance(model(**BATCH), ChunkedOutput)
    # the logits are the same; float32 losses are summed in another order
    torch.testing.assert_close(loss, stock, rtol=1e-6, atol=0)
    assert (found - expected).norm() <= ROUNDING[dtype] * expected.norm()
    assert not isinstance(model(**BATCH), ChunkedOutput)
    assert "forward" not in vars(model)


def test_a_chunked_output_is_taken_apart_like_a_stock_one() -> None:
    model = Adapted(llama())
    want = model(**BATCH)
    with chunked_loss(model, BATCH):
        have: Any = model(**BATCH)
        assert type(model(**BATCH)) is ChunkedOutput
    loss, logits = have
    torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(logits, want[1])
    for number in (2, -3):
        with pytest.raises(IndexError):
            have[number]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weighted_loss_is_as_exact_as_the_stock_one(dtype: torch.dtype) -> None:
    # a factor on the loss is applied after the gradient was rounded, not before: another rounding, not a worse one
    _, exact = gradients(Adapted(llama(dtype).float()), 0.3)
    model = Adapted(llama(dtype))
    _, stock = gradients(model, 0.3)
    with chunked_loss(model, BATCH):
        _, found = gradients(model, 0.3)
    assert (found - exact).norm() <= 1.1 * (stock - exact).norm()


def test_the_head_sees_no_more_than_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Adapted(llama())
    seen = []
    original = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] == VOCABULARY:
            seen.append((tuple(x.shape), x.is_contiguous()))  # a strided input copies the weight for each row
        return original(x, weight, bias)

    with chunked_loss(model, BATCH):
        monkeypatch.setattr(nn.functional, "linear", linear)
        train_step(model, BATCH)
    assert seen == [((6, 1, 32), True)]


def test_without_gradient_and_without_padding() -> None:
    model = Adapted(llama())
    batch = {name: value[:1, :4] for name, value in collate(rows(1, masked=False)).items()}
    with torch.no_grad():
        stock = train_step(model, batch)
        with chunked_loss(model, batch):
            torch.testing.assert_close(train_step(model, batch), stock)


def test_a_plugins_own_loss_finds_logits_and_hidden_states() -> None:
    model = Adapted(llama())

    def combined(inner: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        output = inner(**batch, output_hidden_states=True)
        squares = output.logits.float().square().mean()
        total: Tensor = output.loss + 0.1 * squares + output["hidden_states"][1].mean() + output[0]
        return total

    stock = combined(model, BATCH)
    expected = torch.autograd.grad(stock, list(model.params().values()))
    with chunked_loss(model, BATCH):
        loss = combined(model, BATCH)
        found = torch.autograd.grad(loss, list(model.params().values()))
    torch.testing.assert_close(loss, stock)
    torch.testing.assert_close(found, expected)


def test_hooks_anywhere_run_as_before() -> None:
    model = Adapted(llama())
    calls: list[str] = []
    for part in (model, model.base, model.base.model, model.base.model.layers[0]):
        part.register_forward_pre_hook(lambda m, a: calls.append(type(m).__name__))
    train_step(model, BATCH)
    stock, calls[:] = list(calls), []
    with chunked_loss(model, BATCH):
        calls.clear()
        train_step(model, BATCH)
    assert calls == stock


def test_with_gradient_checkpointing() -> None:
    model = Adapted(llama()).train()
    _, expected = gradients(model)
    model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with chunked_loss(model, BATCH) as active:
        assert active
        torch.testing.assert_close(gradients(model)[1], expected)


def soft_cap(cap: float | None) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=cap,
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config).requires_grad_(False).eval()


def scaled(kind: str, **factor: float) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **factor,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).requires_grad_(False).eval()


def mixture() -> Any:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        output_router_logits=True,
    )
    return transformers.MixtralForCausalLM(config).requires_grad_(False).eval()


def encoder() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return BertForMaskedLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: soft_cap(30.0),
        lambda: scaled("Cohere", logit_scale=0.0625),
        lambda: scaled("Granite", logits_scaling=8.0),
        mixture,
        encoder,
        lambda: llama(torch.float64),
    ],
    ids=["soft cap", "logit scale", "logits scaling", "router loss", "masked model", "float64"],
)
def test_another_loss_than_the_plain_one_is_left_alone(make: Callable[[], Any]) -> None:
    model = make()
    stock = train_step(model, BATCH)
    with chunked_loss(model, BATCH) as active:
        assert not active
        assert torch.equal(train_step(model, BATCH), stock)


def test_the_same_families_without_their_speciality_are_chunked() -> None:
    assert find_head(soft_cap(None), BATCH) is not None
    assert find_head(scaled("Cohere", logit_scale=1.0), BATCH) is not None


def with_bias(model: Adapted) -> None:
    model.base.lm_head.bias = nn.Parameter(torch.zeros(VOCABULARY), requires_grad=False)


def adapted_head(model: Adapted) -> None:
    model.base.lm_head.register_forward_hook(lambda m, a, y: y + 0.1)


def hook_before_head(model: Adapted) -> None:
    model.base.lm_head.register_forward_pre_hook(lambda m, a: (a[0] * 2,))


def trained_head(model: Adapted) -> None:
    model.base.lm_head.requires_grad_(True)


def other_head(model: Adapted) -> None:
    model.base.lm_head.__class__ = type("Quantized", (nn.Linear,), {})


def offloaded_head(model: Adapted) -> None:
    model.base.lm_head.forward = model.base.lm_head.forward


@pytest.mark.parametrize(
    "change", [with_bias, adapted_head, hook_before_head, trained_head, other_head, offloaded_head]
)
def test_a_head_that_is_more_than_its_weight_is_left_alone(change: Callable[[Adapted], object]) -> None:
    model = Adapted(llama())
    change(model)
    assert find_head(model, BATCH) is None
    model = Adapted(llama())
    with chunked_loss(model, BATCH) as active:  # changed while it is on
        assert active
        change(model)
        loss = train_step(model, BATCH)
    torch.testing.assert_close(loss, train_step(model, BATCH), rtol=0, atol=0)


def test_calls_that_ask_for_something_else_go_the_models_way() -> None:
    model = Adapted(llama())
    with chunked_loss(model, BATCH):
        assert model(input_ids=BATCH["input_ids"]).logits.shape[1] == BATCH["input_ids"].shape[1]
        assert isinstance(model(**BATCH, return_dict=False), tuple)
        assert not isinstance(model(**BATCH, num_items_in_batch=3), ChunkedOutput)


def test_it_can_be_switched_off_and_leaves_random_numbers_alone() -> None:
    model = Adapted(llama(), dropout=0.5).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with chunked_loss(model, BATCH, enabled=False) as active:
        assert not active
    with chunked_loss(model, BATCH) as active:
        assert active
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_within_restores_the_model() -> None:
    model = Adapted(llama())
    with pytest.raises(KeyError), chunked_loss(model, BATCH):
        raise KeyError
    assert "forward" not in vars(model)
    assert not model.base.lm_head._forward_pre_hooks
