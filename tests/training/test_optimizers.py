"""The choice of the optimizer: all compute AdamW, all are resumed, and where one cannot run is said first."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Adapted, llama, rows, train_step
from variants import refused, rows_file, say

from hubkit.training.events import Stepped
from hubkit.training.loop import fit
from hubkit.training.optimizers import PAGED, require_optimizer
from hubkit.training.options import TrainOptions
from hubkit.verbs.train import train

OPTIONS = TrainOptions(steps=6, batch_size=2, learning_rate=0.02, save_every=2, seed=1)
QUIET = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
NEEDS_IT = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


class Stop(Exception):
    """Ends a run between two steps, as a kill would."""


def trained(folder: Path, options: TrainOptions, stop: int = 0, device: str = "cpu", **more: Any) -> torch.Tensor:
    # 80 x 32 numbers in a factor: enough for bitsandbytes to keep their moments in 8 bits
    model = Adapted(llama(), dropout=0.2, rank=160).to(device)

    def report(event: object) -> None:
        if isinstance(event, Stepped) and event.step == stop:
            raise Stop

    fit(model, model.params(), train_step, rows(10), (), options, run_dir=folder, report=report, **more)
    return torch.cat([param.detach().flatten().clone() for param in model.params().values()])


def law(name: str, folder: Path, device: str) -> None:
    """As torch's AdamW as its bits allow, and the same bytes when it was stopped."""
    options = replace(OPTIONS, optimizer=name)
    start = trained(folder / "start", replace(OPTIONS, steps=1, learning_rate=1e-12), device=device)
    want, have = trained(folder / "torch", OPTIONS, device=device), trained(folder / "whole", options, device=device)
    assert (have - want).norm() <= (1e-3 if "32" in name else 0.1) * (want - start).norm()
    with pytest.raises(Stop):
        trained(folder / "cut", options, stop=5, device=device)
    assert torch.equal(trained(folder / "cut", options, device=device, resume=True), have)
    refused("HK-RESUME", trained, folder / "cut", OPTIONS, device=device, resume=True)


@QUIET
@NEEDS_IT
@pytest.mark.parametrize("name", PAGED)
def test_on_a_cpu_bitsandbytes_pages_nothing_and_computes_the_same(name: str, tmp_path: Path) -> None:
    law(name, tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@NEEDS_IT
@pytest.mark.parametrize("name", PAGED)
def test_on_a_gpu(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    law(name, tmp_path, "cuda")
    done = train(str(tiny_llama), rows_file(tmp_path / "rows.jsonl"), tmp_path / "out", steps=4, optimizer=name)
    assert done.metrics.steps == 4


def test_where_it_cannot_run_is_said_before_anything_is_loaded(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_optimizer("adamw", torch.device("cpu"))
    for name in PAGED:  # neither the rows nor the base are there
        line = ("train", tmp_path / "none", tmp_path / "none.jsonl", "-o", tmp_path / "out", "--optimizer", name)
        said = say(capsys, *line)
        assert said.refusal() == "HK-OPTIMIZER"
        assert "the device cpu" in said.err
        assert "--optimizer adamw" in said.err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused("HK-OPTIMIZER", require_optimizer, "paged_adamw_8bit", torch.device("cuda", 0))
    assert "hubkit-adapters[bitsandbytes]" in error.fix
    assert say(capsys, *line[:-1], "lion").refusal(2) == "HK-USAGE"
    options: dict[str, Any] = {"optimizer": "lion"}
    refused("HK-OPTIONS", train, str(tiny_llama), rows_file(tmp_path / "r.jsonl"), tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))
