"""Bottleneck adapters obey the laws of methods in all placements, go through the verbs, and are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from variants import names, refused, rows_file, say, tree

from hubkit.artifact.folder import open_adapter
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import MethodSuite, batch, randomize, tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Stack, Sum
from hubkit.verbs.export import export
from hubkit.verbs.generate import generate
from hubkit.verbs.merge import merge
from hubkit.verbs.pack import pack
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify

PLACEMENTS = (
    {"reduction": 4},
    {"placement": "houlsby", "width": 3, "activation": "silu", "scaling": "learned"},
    {"placement": "parallel", "reduction": 0.5, "scaling": "channel", "activation": "gelu", "layers": [1]},
)


class TestAdapters(MethodSuite):
    method = "adapters"
    configs = {"llama": PLACEMENTS, "gpt2": PLACEMENTS}  # noqa: RUF012

    def test_order_matters_in_a_stack_and_not_in_a_sum(self, case: tuple[str, Mapping[str, Any]]) -> None:
        attached = self.attached(case, 2)
        found = []
        for mix in (Stack(["a", "b"]), Stack(["b", "a"]), Sum({"a": 1.0, "b": 1.0})):
            attached.set_mix(mix)
            found.append(attached(batch()).logits)
        if case[1].get("placement") == "parallel":  # it sees the residual stream, never what others added
            self.near(found[1], found[0])
            self.near(found[2], found[0])
        else:
            assert not torch.allclose(found[0], found[1], atol=1e-3)
            assert not torch.allclose(found[0], found[2], atol=1e-3)


def made(base: Base, **options: Any) -> Adapter:
    method = host().load("adapters")
    return Adapter.fresh("a", method, parse_config(method.info.config, options, "test"), base, 0)


def test_dropout_acts_in_training_only() -> None:
    attached = Attached(tiny_model("llama"))
    attached.add("a", randomize(made(attached.sites, reduction=4, dropout=0.5), 1))
    attached.set_mix("a")
    still = attached(batch()).logits
    assert torch.equal(attached(batch()).logits, still)
    attached.train()
    assert not torch.equal(attached(batch()).logits, attached(batch()).logits)
    attached.eval()
    assert torch.equal(attached(batch()).logits, still)


def test_decoding_step_by_step_gives_the_same_logits() -> None:
    attached = Attached(tiny_model("llama"))
    attached.add("a", randomize(made(attached.sites, placement="houlsby", reduction=4), 1))
    attached.set_mix("a")
    ids = batch()
    first = attached(ids[:, :4], use_cache=True)
    rest = attached(ids[:, 4:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, rest.logits], 1), attached(ids).logits, atol=1e-5)


def test_a_block_needs_its_layer() -> None:
    model: Any = tiny_model("llama")
    attached = Attached(model)
    attached.add("a", randomize(made(attached.sites, reduction=4), 1))
    block, x = model.model.layers[0].mlp, torch.randn(1, 3, 16)
    with attached.using(None):
        block(x)
    attached.set_mix("a")
    assert "model.layers.0.mlp" in refused("HK-BLOCK", block, x).what
    attached(batch())


@pytest.mark.parametrize(
    ("reduction", "near"),
    [(3.0, "reduction=2 (width 8), reduction=4 (width 4)"), (17.0, "reduction=16 (width 1)"), (0.3, "reduction=1")],
)
def test_a_reduction_that_does_not_divide_names_those_that_do(reduction: float, near: str) -> None:
    error = refused("HK-CONFIG", made, Base.from_model(tiny_model("llama")), reduction=reduction)
    assert near in error.fix
    assert "16 hidden units" in error.what


@pytest.mark.parametrize(
    "options",
    [{"reduction": 0}, {"width": 0}, {"dropout": 1.0}, {"activation": "rely"}, {"scaling": "x"}, {"placement": "up"}],
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    refused("HK-CONFIG", made, Base.from_model(tiny_model("llama")), **options)


def test_a_base_without_known_layers_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.config.model_type = "frobnicator"
    error = refused("HK-TARGET", made, Base.from_model(model))
    assert error.have == ["frobnicator"]


def test_an_adapters_life(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    config = {"placement": "houlsby", "reduction": 2, "scaling": "learned"}
    run: Any = {"method": "adapters", "steps": 6, "learning_rate": 0.02, "validation": 0.2, "config": config}
    done = train(str(tiny_llama), rows, tmp_path / "chat", **run)
    assert done.metrics.validation_loss is not None
    assert done.metrics.untrained_loss is not None
    assert done.metrics.validation_loss < done.metrics.untrained_loss
    assert names(tmp_path / "chat") == {
        "hubkit.json",
        "README.md",
        "adapter_model.safetensors",
        "tensors.json",
        "metrics.json",
    }
    assert verify(str(tmp_path / "chat"), base=str(tiny_llama)).overrides == ()
    again = train(str(tiny_llama), rows, tmp_path / "again" / "chat", **run)
    assert again.digest == done.digest
    said = generate("What is 2 and 2?", base=str(tiny_llama), terms=str(tmp_path / "chat"), max_new_tokens=4)
    assert [weight for _, weight in said.adapters] == [1.0]
    before = tree(tmp_path)
    chat = str(tmp_path / "chat")
    assert "a network of its own" in str(refused("HK-NOT-MERGEABLE", merge, str(tiny_llama), chat, tmp_path / "m"))
    assert say(capsys, "compose", chat, "+", chat, "-o", tmp_path / "c").status == 1
    assert say(capsys, "export", chat, "--to", "peft", "-o", tmp_path / "p").refusal() == "HK-EXPORT"
    wrong = ("train", tiny_llama, rows, "-o", tmp_path / "x", "--method", "adapters", "--set", "reduction=5")
    assert say(capsys, *wrong).refusal() == "HK-CONFIG"
    assert tree(tmp_path) == before


def test_to_adapterhub_and_back_is_the_identity(tiny_gpt2: Path, tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "rows.jsonl")
    config = {"placement": "parallel", "width": 3, "scaling": "channel", "activation": "gelu_tanh", "layers": [1]}
    train(str(tiny_gpt2), rows, tmp_path / "a.b", method="adapters", steps=2, config=config)
    export(str(tmp_path / "a.b"), tmp_path / "hub", to="adapterhub")
    assert names(tmp_path / "hub") == {"adapter_config.json", "adapter.safetensors"}
    pack(tmp_path / "hub", base=str(tiny_gpt2), name="a.b")
    one, two = open_adapter(tmp_path / "a.b"), open_adapter(tmp_path / "hub")
    assert one.manifest.config == two.manifest.config
    assert one.weights_path.read_bytes() == two.weights_path.read_bytes()
    assert names(tmp_path / "hub") == {"hubkit.json", "README.md", "adapter_model.safetensors", "tensors.json"}
