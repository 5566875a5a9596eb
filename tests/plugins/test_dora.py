"""DoRA obeys the laws of methods, in all its configurations; its gradient is PEFT's, with and without dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from zoo import model_of

from hubkit.errors import HubkitError
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import MethodSuite, batch, randomize, tiny_model
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Stack, Sum

GRADIENT = {"gpt2": 1e-10, "llama": 1e-5}
"""Largest difference of two gradients relative to the largest value: fp64, and fp32 in another order."""


class TestDora(MethodSuite):
    method = "dora"
    configs = {  # noqa: RUF012
        "llama": (
            {},
            {"targets": ["q_proj", "v_proj"], "rank": 4, "rslora": True, "init": "gaussian"},
            {
                "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
                "alpha_pattern": {"v_proj": 3},
                "layers": "1",
            },
        ),
        "gpt2": ({}, {"targets": ["c_attn"], "rank": 4, "modules_to_save": ["lm_head", "ln_f"]}),
    }


def attached(model: nn.Module, name: str = "a", seed: int | None = 3, **options: Any) -> Attached:
    """`model` with one adapter of this method, random unless `seed` is None."""
    method = host().load("dora")
    made = Attached(model)
    adapter = Adapter.fresh("x", method, parse_config(method.info.config, options, "x"), made.sites, 0)
    made.add(name, adapter if seed is None else randomize(adapter, seed))
    made.set_mix(name)
    return made


def beside_peft(family: str, targets: list[str], dropout: float = 0.0) -> tuple[Attached, Any]:
    """The same adapter here and in PEFT, on equal models, both in training mode."""
    ours = attached(tiny_model(family), targets=targets, rank=4, alpha=6, dropout=dropout).train()
    options = {"r": 4, "lora_alpha": 6, "lora_dropout": dropout, "use_dora": True, "fan_in_fan_out": family == "gpt2"}
    theirs = get_peft_model(tiny_model(family), LoraConfig(target_modules=targets, **options))
    if family == "gpt2":
        theirs.double()
    values = ours.adapters["a"].tensors()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[_key(name)])
    return ours, theirs.train()


def _key(name: str) -> str:
    """PEFT's name of a live parameter as it is in the file."""
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_is_that_of_peft(family: str, dropout: float) -> None:
    alone = {"gpt2": ["h.0.attn.c_attn"], "llama": ["layers.0.mlp.up_proj"]}  # one site: one mask of dropout
    several = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "k_proj", "v_proj", "down_proj"]}
    ours, theirs = beside_peft(family, (alone if dropout else several)[family], dropout)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(4)
        dropouts_of_the_base(model)
        loss: Tensor = model(input_ids=batch(), labels=batch()).loss
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=GRADIENT[family])
    form, base = host().load("dora").peft_form, ours.sites
    assert form is not None
    mine = {
        f"base_model.model.{site}.{form.roles[base.sites[site].kind][role]}": parameter.grad
        for site, part in ours.adapters["a"].parts.items()
        for role, parameter in part.roles().items()
    }
    grads = {_key(n): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == grads.keys()
    for name, grad in mine.items():
        want = grads[name]
        assert grad is not None
        assert want is not None
        assert (grad - want).abs().max() <= GRADIENT[family] * max(1e-3, float(want.abs().max())), name


def dropouts_of_the_base(model: nn.Module) -> None:
    """Off: GPT-2 has its own, which would draw from the generator in between."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora" not in name:
            module.p = 0.0


def test_the_fast_way_is_the_plain_formula() -> None:
    model = attached(tiny_model("llama"))
    want = model(batch()).logits
    model.set_mix(Sum([("a", 0.5), ("a", 0.5)]))
    assert (model(batch()).logits - want).abs().max() < 1e-5
    with torch.no_grad():
        model.set_mix("a")
        assert (model(batch()).logits - want).abs().max() < 1e-5


def test_a_value_that_changes_while_frozen_is_noticed() -> None:
    model = attached(tiny_model("llama"))
    model.adapters["a"].to_compute_dtype()
    before = model(batch()).logits
    with torch.no_grad():
        for name, parameter in model.adapters["a"].parameters().items():
            if name.endswith(".B"):
                parameter.mul_(3)
    frozen = model(batch()).logits
    for parameter in model.adapters["a"].parameters().values():
        parameter.requires_grad_(True)
    assert torch.equal(frozen, model(batch()).logits)
    assert not torch.allclose(frozen, before)


def test_rows_that_cancel_or_are_empty() -> None:
    """W + s B A near zero, where the cheap norm has no digits left, and a weight with a row of zeros."""
    model = tiny_model("gpt2")
    made = attached(model, targets=["c_attn"], rank=16, alpha=16)
    site = made.sites.sites["transformer.h.0.attn.c_attn"]
    part: Any = made.adapters["a"].parts[site.name]
    with torch.no_grad():
        part.A.copy_(torch.eye(16, dtype=torch.float64))
        part.B.copy_(-site.weight() * (1 - 1e-6))
        part.B[0] = 0
        assert site.module is not None
        site.module.get_parameter("weight")[:, 0] = 0
    want = (site.weight() + part.scale * part.B @ part.A).norm(dim=1)
    have = part.norm(site)
    assert (have - want).abs().max() <= 1e-9 * want.abs().max()
    assert have[0] == 0
    made.set_mix("a")
    loss = made(batch(), labels=batch()).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in part.parameters())
    delta = made.adapters["a"].delta(site)
    assert delta is not None
    matrix = delta.matrix()
    assert matrix is not None
    assert torch.isfinite(matrix).all()


def test_half_precision_keeps_the_magnitudes() -> None:
    """A change of m by a thousandth is below the digits of bf16: stored and computed all the same."""
    model = attached(tiny_model("llama").bfloat16(), seed=None, targets=["up_proj"])
    plain = model(batch()).logits
    adapter = model.adapters["a"]
    fresh = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    with torch.no_grad():
        for name, parameter in adapter.parameters().items():
            if name.endswith(".m"):
                parameter.mul_(1.001)
    adapter.to_compute_dtype()
    assert torch.equal(Attached(tiny_model("llama").bfloat16())(batch()).logits, plain), "fresh: the base, bit for bit"
    stored = adapter.tensors()
    magnitudes = [name for name in stored if name.endswith("magnitude_vector")]
    assert {str(stored[name].dtype) for name in magnitudes} == {"torch.float32"}
    assert {str(t.dtype) for name, t in stored.items() if name not in magnitudes} == {"torch.bfloat16"}
    assert all(torch.allclose(stored[n] / fresh[n], torch.tensor(1.001), atol=1e-6) for n in magnitudes)


def test_what_inference_mode_left_does_not_stand_in_the_way_of_training() -> None:
    model = attached(tiny_model("llama"), targets=["q_proj"])
    model.adapters["a"].to_compute_dtype()
    with torch.inference_mode():
        want = model(batch()).logits.clone()
    model.add("b", attached(tiny_model("llama"), targets=["q_proj"], seed=5).adapters["a"])
    model.set_mix(Sum({"a": 1.0, "b": 1.0}))
    model(batch(), labels=batch()).loss.backward()
    assert all(p.grad is not None for p in model.adapters["b"].parameters().values())
    model.set_mix("a")
    assert torch.equal(model(batch()).logits, want)


def test_recomputed_activations_give_the_same_gradient() -> None:
    found = []
    for recompute in (False, True):
        model = attached(tiny_model("llama")).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": model.checkpoint_contexts})
        model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
        found.append([p.grad for p in model.adapters["a"].parameters().values()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_stands_on_what_is_below_it() -> None:
    """In a stack the norm is that of the changed weight."""
    model = attached(tiny_model("gpt2"), targets=["c_fc"], rank=4)
    model.add("b", randomize(attached(tiny_model("gpt2"), targets=["c_fc"], rank=4).adapters["a"], 7))
    model.set_mix(Stack(["a", "b"]))
    one = model(batch()).logits
    model.set_mix(Sum({"a": 1.0, "b": 1.0}))
    assert not torch.allclose(model(batch()).logits, one, atol=1e-3)


def test_an_embedding_is_refused() -> None:
    with pytest.raises(HubkitError, match="HK-TARGET"):
        attached(tiny_model("llama"), targets=["embed_tokens"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_part_is_the_base_bit_for_bit_beside_any_bias(dtype: torch.dtype) -> None:
    """Biases far larger and far smaller than the products: taking one off and adding it again would lose bits."""
    for size in (1e-3, 1.0, 30.0):
        model = model_of("qwen2")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.bias"):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * size)
        model.to(dtype)
        want = model(batch()).logits
        ours = attached(model, seed=None)
        assert torch.equal(ours(batch()).logits, want)
        assert torch.equal(ours(batch(), route=["a", None, "a"]).logits, want)
