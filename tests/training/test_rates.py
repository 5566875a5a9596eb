"""Learning rates that differ by tensor: plain torch with parameter groups is the reference, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from variants import rows_file, tree

from hubkit.methods.host import host
from hubkit.methods.recipes import layer_rate
from hubkit.methods.suite import tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.training.rows.encode import Row
from hubkit.training.stepper import Stepper
from hubkit.verbs.train import train

RATES = {"a": 0.25, "c": 2.0}


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    return sum((((p - 1) ** 2).sum() for p in model.parameters()), torch.zeros(()))


def model() -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(0)
    return nn.ParameterDict({name: nn.Parameter(torch.randn(5, generator=generator)) for name in "abcd"})


def stepped(rates: dict[str, float] | None) -> dict[str, torch.Tensor]:
    module = model()
    stepper = Stepper(module, dict(module.items()), step, weight_decay=0.01, clip=0.0, rates=rates)
    for _ in range(3):
        stepper.step([[Row([1, 2], [1, 2], "row")]], 0.1, lambda: False)
    return {name.removeprefix("param/"): value.detach().clone() for name, value in stepper.tensors().items()}


def test_each_tensor_moves_at_its_own_rate() -> None:
    module = model()
    groups = [{"params": [p], "lr": 0.1 * RATES.get(name, 1.0)} for name, p in module.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        step(module, None).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    have = stepped(RATES)
    assert all(torch.equal(have[name], p) for name, p in module.items())


def test_a_factor_of_one_changes_no_bit() -> None:
    plain = stepped(None)
    for rates in ({}, dict.fromkeys("abcd", 1.0)):
        assert all(torch.equal(value, plain[name]) for name, value in stepped(rates).items())
    other = stepped(RATES)
    assert all(torch.equal(other[name], plain[name]) == (name not in RATES) for name in "abcd")


@pytest.mark.parametrize(
    ("site", "steps"),
    [
        ("model.embed_tokens", 3),
        ("model.layers.0.mlp.up_proj", 2),
        ("transformer.h.1.ln_1", 1),
        ("model.norm", 0),
        ("lm_head", 0),
        ("transformer.wpe", 3),
    ],
)
def test_layers_are_counted_from_the_top(site: str, steps: int) -> None:
    assert layer_rate(site, 0.5, 2) == 0.5**steps
    assert layer_rate(site, 1.0, 0) == 1.0


def test_a_method_gives_a_factor_for_each_of_its_tensors() -> None:
    method = host().load("selective")
    config = method.info.config(layer_decay=0.5, depth=2, weights=("q_proj", "norm"), biases=())
    rates = Adapter.fresh("a", method, config, Base.from_model(tiny_model("llama")), 0).learning_rates()
    assert rates == {
        "model.layers.0.self_attn.q_proj.weight": 0.25,
        "model.layers.1.self_attn.q_proj.weight": 0.5,
    }


def test_a_run_with_them_is_resumed_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """The moments of every group are in the checkpoint, by the name of the tensor."""
    torch.set_num_threads(1)
    rows = rows_file(tmp_path / "rows.jsonl")
    config = {"layer_decay": 0.5, "depth": 2}
    options: dict[str, Any] = {"method": "selective", "config": config, "steps": 6, "save_every": 2}

    def stop(event: Any) -> None:
        if getattr(event, "step", 0) == 3:
            raise KeyboardInterrupt

    train(str(tiny_llama), rows, tmp_path / "a" / "x", **options)
    with pytest.raises(KeyboardInterrupt):
        train(str(tiny_llama), rows, tmp_path / "b" / "x", report=stop, **options)
    train(str(tiny_llama), rows, tmp_path / "b" / "x", resume=True, **options)
    assert tree(tmp_path / "a" / "x") == tree(tmp_path / "b" / "x")
