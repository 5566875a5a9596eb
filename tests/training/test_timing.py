"""How long a training takes: what is counted by hand, and what is measured in a plausible order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hubkit.methods.host import host
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.base import Base
from hubkit.training.advice.activations import Pass, saved_by
from hubkit.training.advice.timing import Epoch, Training, epoch_of, layer_seconds, operations_of, took
from hubkit.training.rows.encode import Row
from hubkit.verbs.plan import settled

ONE = Pass(2, 16, torch.float32)
EPOCH = Epoch(passes=10, steps=5, tokens=320, pairs=320 * 16, targets=0, held=0)
CPU = torch.device("cpu")


def numbers(folder: Path) -> int:
    """Of the linear layers but the head."""
    base = Base.from_model(outline(folder))
    return sum(s.shape[0] * s.shape[1] for s in base.linear() if not base.arch.is_head(s.name))


def operations(folder: Path, name: str, training: Training) -> float:
    model: Any = outline(folder)
    method = host().load(name)
    config = method.info.config(rank=1)
    with torch.device("meta"):
        parts = method.inject(Base.from_model(model), config)
    saved = saved_by(method, config, model, parts, training.one)
    return sum(operations_of(saved, training, frozenset([model.config.vocab_size])).values())


def test_products_are_those_of_the_rule_of_thumb(tiny_llama: Path) -> None:
    """Two operations a number forward, two backward; attention and parts of rank 1 add less than half of it."""
    plain = operations(tiny_llama, "lora", Training(ONE, EPOCH, False))
    want = 4 * numbers(tiny_llama) * EPOCH.tokens
    assert 0.95 * want < plain < 1.5 * want, "the first layer has nothing before it that a gradient is for"
    again = operations(tiny_llama, "lora", Training(ONE, EPOCH, True))
    assert again / plain == pytest.approx(1.5, abs=0.1)
    held = operations(tiny_llama, "lora", Training(ONE, replace(EPOCH, held=320), False))
    assert held > again, "what is held out passes the head, too"


def test_the_head_gets_targets_alone(tiny_llama: Path) -> None:
    none, all_of_them = (
        operations(tiny_llama, "lora", Training(ONE, replace(EPOCH, targets=count), False)) for count in (0, 320)
    )
    config: Any = outline(tiny_llama).config
    assert all_of_them - none == pytest.approx(4 * config.hidden_size * config.vocab_size * 320)


def test_an_epoch_is_what_training_draws() -> None:
    rows = [Row((1,) * n, (-100,) * (n - 1) + (1,)) for n in (4, 4, 4, 6, 6, 6, 6, 8)]
    epoch = epoch_of(rows, 2, 2, 0.0)
    assert (epoch.passes, epoch.steps, epoch.targets, epoch.held) == (4, 2, 8, 0)
    assert sum(len(row.ids) for row in rows) <= epoch.tokens <= 8 * 8
    assert epoch.pairs >= epoch.tokens * 4
    held = epoch_of(rows, 2, 2, 0.25)
    assert held.held >= 8
    assert held.passes == 3


@pytest.mark.parametrize("name", ["lora", "full", "qlora", "prompt"])
def test_it_is_measured_on_layers_of_the_base(name: str, tiny_llama: Path) -> None:
    model = outline(tiny_llama)
    method, settings = settled(name, None, model, None)
    said = took(method, settings, Base.from_model(model), model, Training(ONE, EPOCH, False), CPU)
    assert 0 < said.least < said.most < 600
    nowhere = took(method, settings, Base.from_model(model), model, Training(ONE, EPOCH, False), None)
    assert (nowhere.least, nowhere.speed, nowhere.operations) == (0, 0, said.operations)


def test_large_layers_are_not_tried(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubkit.training.advice.timing.LARGEST", 1000)
    model = outline(tiny_llama)
    method, settings = settled("lora", None, model, None)
    assert layer_seconds(method, settings, model, [], (1, 8), torch.float32, CPU) is None
    assert took(method, settings, Base.from_model(model), model, Training(ONE, EPOCH, False), CPU).speed == 0
