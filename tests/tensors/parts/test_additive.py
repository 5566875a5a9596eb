"""Norms as sites, and changes of a module's own weight and bias: the module itself, trained, is the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from variants import refused

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import TOLERANCE, batch, randomize, tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Stack, Sum
from hubkit.tensors.parts.tied import TiedChange
from hubkit.tensors.weights.merging import plan_merge, write_merged

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 48}


def made(family: str) -> Any:
    """A tiny model: norms of (1 + w), norms of queries and keys, biases in norms, parallel blocks, untied and tied."""
    import transformers as t

    torch.manual_seed(3)
    grouped = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
    configs: dict[str, Callable[[], Any]] = {
        "gemma": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**grouped)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**grouped)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**grouped, tie_word_embeddings=True)),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SMALL)),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=48)),
    }
    model = configs[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def adapter(base: Base, method: str, seed: int = 1, **config: Any) -> Adapter:
    chosen = host().load(method)
    fresh = Adapter.fresh("a", chosen, parse_config(chosen.info.config, config, "test"), base, 0)
    return randomize(fresh, seed)


@pytest.mark.parametrize("family", ["gemma", "gemma3", "qwen3", "phi", "bloom"])
def test_files_and_live_models_have_the_same_norms_and_a_changed_model_is_the_adapter(
    family: str, tmp_path: Path
) -> None:
    """The reference is the model itself with its parameters overwritten by what is merged: norms, embeddings, all."""
    model = made(family)
    model.save_pretrained(tmp_path)
    live, files = Base.from_model(model), Base.from_folder(tmp_path)
    kinds = {name: (site.kind, site.shape, site.bias_tensor) for name, site in live.sites.items()}
    assert {name: (site.kind, site.shape, site.bias_tensor) for name, site in files.sites.items()} == kinds
    norms = [name for name, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    assert sorted(name for name, site in live.sites.items() if site.kind == "norm") == sorted(norms) != []
    attached = Attached(model, live)
    changes = adapter(live, "full")
    attached.add("a", changes)
    attached.set_mix("a")
    with torch.no_grad():
        want = attached(batch()).logits
        plan = plan_merge(live, "a", attached.adapters)
        twin = copy.deepcopy(attached.detach())
        for site in plan.sites:
            module: Any = twin.get_submodule(site.name)
            module.weight.copy_(plan.weight(site))
            if site.bias_tensor:
                module.bias.copy_(plan.bias(site))
        have = twin(batch()).logits
    assert (have - want).abs().max() <= 10 * TOLERANCE[torch.float32] * want.abs().max()  # large random changes


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_gradient_is_that_of_the_tensors_themselves(family: str) -> None:
    """Trained as an adapter or trained in place: the same gradient for every tensor, tied ones included."""
    model = tiny_model(family)
    model.requires_grad_(True)
    model(input_ids=batch(), labels=batch()).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    attached = Attached(model)
    fresh = Adapter.fresh("a", host().load("full"), host().load("full").info.config(), attached.sites, 0)
    attached.add("a", fresh)
    attached.set_mix("a")
    attached(input_ids=batch(), labels=batch()).loss.backward()
    have = {name: p.grad for name, p in fresh.parameters().items()}
    assert set(have) == set(want)
    for name, grad in have.items():
        assert grad is not None
        site = attached.sites.sites[name.rpartition(".")[0]]
        grad = grad.t() if site.transposed and grad.dim() == 2 else grad.view(want[name].shape)
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mix", ["a", Sum({"a": 0.5, "b": -2.0}), Stack(["b", ("a", 0.3)])])
def test_a_tied_head_follows_its_table_and_stays_tied(mix: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    attached = Attached(model)
    for name, seed in (("a", 1), ("b", 2)):
        attached.add(name, adapter(attached.sites, "full", seed))
    head = attached.adapters["a"].parts["lm_head"]
    assert isinstance(head, TiedChange)
    assert not [name for name in attached.adapters["a"].parameters() if name.startswith("lm_head")]
    attached.set_mix(mix)
    with torch.no_grad():
        want = attached(batch()).logits
    plan = plan_merge(Base.from_folder(tmp_path / "base"), mix, attached.adapters)
    assert plan.tied_head is None
    assert "lm_head" not in {site.name for site in plan.sites}
    (tmp_path / "out").mkdir()
    write_merged(plan, open_shards(tmp_path / "base"), tmp_path / "out")
    assert set(open_shards(tmp_path / "out").headers) == set(open_shards(tmp_path / "base").headers)
    from hubkit.tensors.live.loading import load_base

    merged: Any = load_base(tmp_path / "out")
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert (merged(batch()).logits - want).abs().max() <= 1e-10 * max(1.0, float(want.abs().max()))


def test_beside_a_part_that_changes_the_table_alone_the_tie_breaks() -> None:
    attached = Attached(tiny_model("gpt2"))
    attached.add("a", adapter(attached.sites, "full"))
    attached.add("b", adapter(attached.sites, host().default(), targets=["wte"]))
    plan = plan_merge(attached.sites, Sum(["a", "b"]), attached.adapters)
    assert plan.tied_head is not None
    assert {"lm_head", "transformer.wte"} <= {site.name for site in plan.sites}


def test_in_half_precision_a_change_too_small_for_the_gain_still_acts() -> None:
    """W + Δ in bf16 would be W: the change is computed beside it, in fp32."""
    model = tiny_model("llama").to(torch.bfloat16)
    attached = Attached(model)
    small = adapter(attached.sites, "selective", biases=[], weights=["norm"])
    parameter = small.parameters()["model.norm.weight"]
    parameter.data = torch.full_like(parameter, 1e-3)
    attached.add("a", small)
    hidden: list[torch.Tensor] = []
    model.get_submodule("lm_head").register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    for mix in (None, Sum({"a": 1.0}), Sum({"a": 100.0})):
        attached.set_mix(mix)
        attached(batch())
    gain = attached.sites.sites["model.norm"].weight().flatten().float()
    assert hidden[1].dtype == torch.bfloat16
    moved = ((hidden[2] - hidden[0]).float().abs().mean() / hidden[0].float().abs().mean()).item()
    assert moved == pytest.approx(0.1 / gain.abs().mean().item(), rel=0.1)


def test_other_methods_stay_away_from_norms() -> None:
    """They are never among the targets of a method that cannot serve them, and naming one is refused."""
    base = Base.from_model(tiny_model("llama"))
    assert {site.kind for site in base.match("all-linear")} == {"linear"}
    assert "norm" not in {site.kind for site in base.match(r".*layers\.0\..*", "linear")}
    assert len(base.match("all-norm", ("linear", "norm"))) == 5
    for target in ("norm", "all-norm", ["q_proj", "model.layers.0.input_layernorm"], r".*layernorm"):
        error = refused("HK-TARGET", base.match, target, "linear")
        assert "cannot act" in str(error)
        refused("HK-TARGET", base.match, target)


def test_a_batch_norm_is_no_site() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.BatchNorm1d(4)
            self.norm2 = nn.LayerNorm(4, elementwise_affine=False)
            self.norm3 = nn.LayerNorm((2, 2))
            self.norm4 = nn.RMSNorm(4)

    assert list(Base.from_model(Vision()).sites) == ["norm4"]


@pytest.mark.parametrize(
    ("method", "config", "code"),
    [
        ("selective", {"weights": [], "biases": []}, "HK-TARGET"),
        ("selective", {"biases": ["q_proj"]}, "HK-TARGET"),
        ("selective", {"biases": ["nothing"]}, "HK-TARGET"),
        ("selective", {"weights": ["nothing"]}, "HK-TARGET"),
        ("selective", {"layers": [2]}, "HK-TARGET"),
        ("selective", {"layers": [-3]}, "HK-CONFIG"),
        ("selective", {"layer_decay": 0.9}, "HK-CONFIG"),
        ("selective", {"layer_decay": 0.0}, "HK-CONFIG"),
        ("full", {"layer_decay": 0.9, "depth": 3}, "HK-CONFIG"),
        ("full", {"targets": ["nothing"]}, "HK-TARGET"),
        ("full", {"tensors": ["model.norm.gain"]}, "HK-CONFIG"),
        ("full", {"tensors": ["nowhere.weight"]}, "HK-TARGET"),
    ],
)
def test_refusals(method: str, config: dict[str, Any], code: str) -> None:
    base = Base.from_model(tiny_model("llama"))
    refused(code, lambda: adapter(base, method, **config))


def test_what_is_chosen() -> None:
    base = Base.from_model(tiny_model("gpt2"))
    biases = adapter(base, "selective", weights=[]).parameters()
    assert {name.rpartition(".")[2] for name in biases} == {"bias"}
    assert len(biases) == 2 * 6 + 1
    top = adapter(base, "selective", layers="1").parameters()
    assert {name.split(".")[2] for name in top} == {"1"}
    assert set(adapter(base, "full", biases=False).parameters()) & set(biases) == set()


def test_the_bias_of_a_head_that_follows_its_table_is_refused() -> None:
    from dataclasses import replace

    base = Base.from_model(tiny_model("gpt2"))
    base.sites["lm_head"] = replace(base.sites["lm_head"], bias_tensor="lm_head.bias")
    refused("HK-TARGET", lambda: adapter(base, "selective", weights=["wte"], biases=["lm_head"]))
