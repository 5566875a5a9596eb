"""Training beside PEFT: same initial A and B, rows, order, AdamW and schedule give the same curve of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from variants import rows_file

from hubkit.methods.config import parse_config
from hubkit.methods.foreign import own_files
from hubkit.methods.host import host
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.training.events import Stepped
from hubkit.training.rows.batching import collate, plan_epoch
from hubkit.training.rows.data import Columns, read_rows
from hubkit.training.rows.encode import encode
from hubkit.verbs.train import train

peft = pytest.importorskip("peft")

CURVE = 1e-4
"""Relative difference of two fp32 losses after up to 50 steps that round in different orders."""
STEPS, BATCH, RATE, WARMUP, DECAY, SEED = 50, 3, 0.004, 0.1, 0.01, 3
CONFIG = {"rank": 4, "alpha": 8.0, "rank_pattern": {"q_proj": 2}}


def initial(base: Path, folder: Path) -> None:
    """The parts a run starts from, as PEFT reads them."""
    method = host().load("lora")
    config = parse_config(method.info.config, CONFIG, "test")
    folder.mkdir()
    for name, data in own_files(Adapter.fresh("first", method, config, Base.from_folder(base), SEED)).items():
        (folder / name).write_bytes(data)


def share(step: int) -> float:
    """The learning rate of a step, as a share of the highest: linear warm-up, then half a cosine."""
    import math

    rising = round(WARMUP * STEPS)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (STEPS - rising)))


def curve_of_peft(base: Path, rows: list[Any], folder: Path, accumulate: int) -> list[float]:
    """The loss at each step of a plain training loop around PEFT's model."""
    initial(base, folder)
    model = peft.PeftModel.from_pretrained(load_base(base), str(folder), is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=DECAY)
    losses: list[float] = []
    epoch = 0
    while len(losses) < STEPS:
        for step in plan_epoch([len(row.ids) for row in rows], BATCH, accumulate, SEED, epoch):
            targets = [sum(rows[index].targets() for index in batch) for batch in step]
            total = 0.0
            for batch, count in zip(step, targets, strict=True):
                loss = model(**collate([rows[index] for index in batch], torch.device("cpu"))).loss
                (loss * count / sum(targets)).backward()
                total += float(loss.detach()) * count / sum(targets)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = RATE * share(len(losses))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
        epoch += 1
    return losses[:STEPS]


@pytest.mark.parametrize(("accumulate", "chunked"), [(1, True), (2, True), (1, False)])
def test_the_loss_follows_that_of_peft(accumulate: int, chunked: bool, tiny_llama: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    data = rows_file(tmp_path / "rows.jsonl")
    mine: list[float] = []

    def report(event: object) -> None:
        if isinstance(event, Stepped):
            mine.append(event.loss)

    train(
        str(tiny_llama),
        data,
        tmp_path / "mine",
        config=CONFIG,
        steps=STEPS,
        batch_size=BATCH,
        accumulate=accumulate,
        learning_rate=RATE,
        warmup=WARMUP,
        weight_decay=DECAY,
        seed=SEED,
        chunked_loss=chunked,
        dtype="float32",
        report=report,
    )
    columns = Columns(prompt=("prompt",), completion="completion")
    rows = encode(read_rows(data), load_tokenizer(tiny_llama), columns, max_length=256)
    theirs = curve_of_peft(tiny_llama, rows, tmp_path / "first", accumulate)
    assert len(mine) == STEPS
    assert theirs[-1] < 0.9 * theirs[0], "a run that learns"
    worst = max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True))
    assert worst <= CURVE
