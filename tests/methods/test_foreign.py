"""An adapter as files: PEFT's own names, targets resolved against the base, stable bytes, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from example_method import ia3
from peft import IA3Config, LoraConfig, get_peft_model

from hubkit.artifact.forms import from_peft_config
from hubkit.errors import HubkitError
from hubkit.methods.config import parse_config
from hubkit.methods.foreign import foreign_files, own_files
from hubkit.methods.host import Method, host
from hubkit.methods.suite import batch, randomize, tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter

METHODS = {"lora": lambda: host().load("lora"), "ia3": ia3}
GPT2_IA3 = {"targets": ["c_attn"], "feedforward": ["mlp.c_proj"]}


def adapter(name: str, family: str, values: dict[str, Any], seed: int = 0) -> Adapter:
    method: Method = METHODS[name]()
    base = Base.from_model(tiny_model(family))
    return randomize(Adapter.fresh("x", method, parse_config(method.info.config, values, "x"), base, seed), seed)


def written(made: Adapter) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(foreign_files(made, "peft")["adapter_config.json"])
    return document


def test_targets_are_resolved_sorted_and_stable() -> None:
    one = adapter("lora", "llama", {"targets": ["v_proj", "q_proj"]})
    two = adapter("lora", "llama", {"targets": r".*\.(q|v)_proj"})
    assert written(one)["target_modules"] == ["q_proj", "v_proj"]
    assert foreign_files(one, "peft") == foreign_files(two, "peft")
    assert list(foreign_files(one, "peft")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_bases_storage_is_written() -> None:
    assert written(adapter("lora", "gpt2", {}))["fan_in_fan_out"] is True
    assert written(adapter("lora", "llama", {}))["fan_in_fan_out"] is False
    assert written(adapter("lora", "gpt2", {"targets": ["wte"]}))["fan_in_fan_out"] is False


def test_lists_of_modules_are_part_of_the_targets_and_match_nothing_else() -> None:
    made = written(
        adapter("ia3", "llama", {"targets": ["k_proj"], "feedforward": [f"layers.{n}.mlp.down_proj" for n in (0, 1)]})
    )
    assert (made["target_modules"], made["feedforward_modules"]) == (["down_proj", "k_proj"], ["down_proj"])
    made = written(adapter("ia3", "gpt2", GPT2_IA3))
    full = [f"transformer.h.{n}.mlp.c_proj" for n in (0, 1)]
    assert made["feedforward_modules"] == full
    assert made["target_modules"] == ["c_attn", *full]
    made = written(adapter("ia3", "llama", {"feedforward": []}))
    assert (made["target_modules"], made["feedforward_modules"]) == (["k_proj", "v_proj"], [])


@pytest.mark.parametrize(
    ("name", "family", "config"),
    [
        ("lora", "llama", LoraConfig(r=3, target_modules=["q_proj", "down_proj"], use_rslora=True)),
        ("lora", "gpt2", LoraConfig(r=2, target_modules=["c_attn"], rank_pattern={"h.1.attn.c_attn": 4})),
        (
            "ia3",
            "llama",
            IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ),
        ("ia3", "gpt2", IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
        ("ia3", "llama", IA3Config(target_modules=["down_proj"], feedforward_modules=r".*\.mlp\.down_proj")),
    ],
)
def test_what_peft_trains_computes_the_same_here(name: str, family: str, config: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(family), config)
    generator = torch.Generator().manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    want = model(input_ids=batch()).logits
    model.save_pretrained(str(tmp_path))

    method: Method = METHODS[name]()
    form = method.peft_form
    assert form is not None
    data = json.loads((tmp_path / "adapter_config.json").read_text())
    values = from_peft_config(form, data, "x") | {"targets": data["target_modules"]}
    attached = Attached(tiny_model(family))
    settings = parse_config(method.info.config, values, "x")
    weights = tmp_path / "adapter_model.safetensors"
    attached.add("a", Adapter.read("a", method, settings, attached.sites, weights, None))
    attached.set_mix("a")
    have = attached(batch()).logits
    assert (have - want).abs().max() <= (1e-10 if family == "gpt2" else 1e-5) * want.abs().max()
    again = own_files(attached.adapters["a"])["adapter_model.safetensors"]
    (tmp_path / "again").write_bytes(again)
    back = Adapter.read("b", method, settings, attached.sites, tmp_path / "again", None)
    assert all(torch.equal(t, attached.adapters["a"].tensors()[k]) for k, t in back.tensors().items())


def test_a_form_that_does_not_exist_is_refused() -> None:
    made = adapter("lora", "llama", {})
    with pytest.raises(HubkitError) as caught:
        foreign_files(made, "gguf")
    assert (caught.value.code, caught.value.have) == ("HK-EXPORT", ["gguf"])


def test_a_method_peft_does_not_know_has_its_tensors_alone() -> None:
    made = adapter("ia3", "llama", {})
    vars(made.method)["peft_form"] = None
    assert list(own_files(made)) == ["adapter_model.safetensors"]
    assert sorted(made.tensors())[0] == "model.layers.0.mlp.down_proj.l"
    with pytest.raises(HubkitError, match="HK-EXPORT"):
        foreign_files(made, "peft")
