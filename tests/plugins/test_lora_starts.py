"""Starts of LoRA at factors of the weight (PiSSA, OLoRA) and learning rates by role (LoRA+), beside PEFT's."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from variants import rows_file, tree

from hubkit.errors import HubkitError
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import batch, tiny_model
from hubkit.plugins import lora
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.training.events import Stepped
from hubkit.training.stepper import rate_groups
from hubkit.verbs.train import train

CURVE = 1e-4
"""Relative difference of two fp32 losses after some steps that round in different orders."""
STARTS = ("pissa", "olora")


def fresh(base: Base, name: str = "lora", **options: Any) -> Adapter:
    method = host().load(name)
    return Adapter.fresh("x", method, parse_config(method.info.config, options, "x"), base, 0)


def attached(dtype: torch.dtype = torch.float32, **options: Any) -> Attached:
    made = Attached(tiny_model("llama").to(dtype))
    made.add("a", fresh(made.sites, **options))
    made.set_mix("a")
    return made


@pytest.mark.parametrize("init", STARTS)
def test_a_fresh_adapter_in_half_precision_is_the_base(init: str) -> None:
    want = tiny_model("llama").bfloat16()(batch()).logits
    made = attached(torch.bfloat16, init=init, rank=4)
    assert torch.equal(made(batch()).logits, want)
    made.adapters["a"].to_compute_dtype()
    assert torch.equal(made(batch()).logits, want)


@pytest.mark.parametrize("init", STARTS)
def test_it_starts_and_trains_as_in_peft(init: str) -> None:
    """The same curve of the loss: B A - B0 A0 on the base here, B A on a changed base there."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": init}
    theirs = get_peft_model(tiny_model("llama"), LoraConfig(**options))
    ours = attached(init=init, rank=4, alpha=6, targets=["q_proj", "up_proj"])
    parameters = list(ours.adapters["a"].trainables().values())
    mine = losses(ours.train(), parameters)
    want = losses(theirs.train(), [p for p in theirs.parameters() if p.requires_grad])
    assert want[-1] < want[0] - 0.01, "a run that learns"
    assert max(abs(a - b) / b for a, b in zip(mine, want, strict=True)) <= CURVE
    before = ours.eval()(batch()).logits
    ours.adapters["a"].to_compute_dtype()
    assert (ours(batch()).logits - before).abs().max() <= 1e-5
    assert ours.adapters["a"].trainables() == ours.adapters["a"].parameters()


def losses(model: Any, parameters: list[Any]) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    found = []
    for _ in range(12):
        loss: Tensor = model(input_ids=batch(), labels=batch()).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(
    ("factors", "weight"),
    [(f, w) for f in (lora.principal, lora.orthonormal) for w in (torch.randn(12, 9), torch.randn(9, 12))],
)
def test_the_start_does_not_depend_on_signs(factors: Any, weight: Tensor) -> None:
    """A decomposition is free in its signs; the factors of a weight and of its negative differ in one of them only."""
    (a, b), (c, d) = factors(weight, 3, 2.0), factors(-weight, 3, 2.0)
    assert torch.allclose(a.abs(), c.abs(), atol=1e-5)
    assert torch.allclose(b @ a, -(d @ c), atol=1e-5)
    exact = 2.0 * lora.principal(weight, 9, 2.0)[1] @ lora.principal(weight, 9, 2.0)[0]
    assert torch.allclose(exact, weight, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"init": "pissa", "rank": 9, "targets": ["k_proj"]}, {"init": "olora", "rank": 4, "rank_pattern": {"v_proj": 9}}],
)
def test_more_directions_than_a_weight_has_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(HubkitError, match="HK-CONFIG") as caught:
        attached(**options)
    assert len(caught.value.have) == 2


@pytest.mark.parametrize(
    "options",
    [{"init": "pissa", "alpha": -1}, {"init": "olora", "alpha_pattern": {"q_proj": 0}}, {"lora_plus_ratio": 0}],
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(HubkitError, match="HK-CONFIG"):
        parse_config(host().load("lora").info.config, options, "x")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_groups_are_those_of_peft(method: str) -> None:
    ratio, rate = 16.0, 1e-3
    theirs = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], use_dora=method == "dora")
    )
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio)
    names = {id(p): n.replace(".default", "") for n, p in theirs.named_parameters()}
    want = {g["lr"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups if g["params"]}
    ours = fresh(
        Base.from_model(tiny_model("llama")), method, rank=4, targets=["q_proj", "up_proj"], lora_plus_ratio=ratio
    )
    form = ours.method.peft_form
    assert form is not None
    trained = ours.trainables()
    known = {id(p): n for n, p in trained.items()}
    have: dict[float, set[str]] = {}
    for group in rate_groups(trained, ours.learning_rates()):
        pairs = [known[id(p)].rpartition(".") for p in group["params"]]
        keys = {f"base_model.model.{site}.{form.roles['linear'][role]}" for site, _, role in pairs}
        have[group["factor"] * rate] = {f"{k}.weight" if k.endswith("vector") else k for k in keys}
    assert have == want


def interrupted(at: int) -> Any:
    def report(event: object) -> None:
        if isinstance(event, Stepped) and event.step == at:
            signal.raise_signal(signal.SIGINT)

    return report


def test_a_run_is_resumed_with_the_start_it_had(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bytes; another machine's decomposition, whose signs or digits may differ, changes nothing."""
    torch.set_num_threads(1)
    data = rows_file(tmp_path / "rows.jsonl")
    options: dict[str, Any] = {
        "config": {"init": "pissa", "rank": 2, "targets": ["q_proj", "v_proj"], "lora_plus_ratio": 4},
        "steps": 6,
        "learning_rate": 0.01,
        "name": "a",
        "dtype": "float32",
    }
    train(str(tiny_llama), data, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(str(tiny_llama), data, tmp_path / "cut", **options, report=interrupted(3))
    exact = lora.principal
    monkeypatch.setattr(lora, "principal", lambda *args: tuple(-1.001 * factor for factor in exact(*args)))
    other = {**options, "config": {**options["config"], "lora_plus_ratio": 2}}
    with pytest.raises(HubkitError, match="HK-RESUME"):
        train(str(tiny_llama), data, tmp_path / "cut", **other, resume=True)
    train(str(tiny_llama), data, tmp_path / "cut", **options, resume=True)
    whole, cut = tree(tmp_path / "whole"), tree(tmp_path / "cut")
    assert whole["adapter_model.safetensors"] == cut["adapter_model.safetensors"]
    assert whole["adapter_config.json"] == cut["adapter_config.json"]


def test_b_moves_by_its_own_rate(tiny_llama: Path, tmp_path: Path) -> None:
    """AdamW's first step moves every number by the learning rate, whatever its gradient."""
    config = {"init": "olora", "rank": 2, "targets": ["q_proj"], "lora_plus_ratio": 8}
    train(
        str(tiny_llama),
        rows_file(tmp_path / "rows.jsonl"),
        tmp_path / "a",
        config=config,
        steps=1,
        learning_rate=1e-3,
        warmup=0.0,
        schedule="constant",
        dtype="float32",
    )
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").items():
        change = tensor[2:] if "lora_A" in name else tensor[:, :2]
        assert float(change.abs().median()) == pytest.approx(8e-3 if "lora_B" in name else 1e-3, rel=0.01)
