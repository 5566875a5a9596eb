"""Trainings of a tiny base, by as many processes as a launcher has started: ``ranks_run.py BASE ROWS HELD OUT``.

Each training ends as a folder below OUT; what else a test wants to know is in OUT/facts-RANK.json. Run by itself it is
one process: the same trainings as several processes must come to.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from every_method import METHODS

import hubkit
from hubkit.errors import HubkitError
from hubkit.tensors.fourbit.linear import QuantLinear
from hubkit.tensors.live.loading import load_base
from hubkit.training import stepper
from hubkit.training.ranks.joining import joined
from hubkit.training.ranks.launched import launched
from hubkit.training.ranks.sharding import divide

OPTIONS: dict[str, Any] = {"steps": 4, "batch_size": 2, "accumulate": 2, "eval_every": 2, "seed": 3, "save_every": 2}
LATE = ("lora", "pissa", "tokens", "dora", "qlora", "prefix", "full")
"""Methods that are also trained on a base that is divided late: all ways in which parts begin with values of it."""
STOP = 2
"""The steps after which a training is stopped that is to be resumed."""


class Runs:
    """The trainings of one launch.

    Args:
        base, rows, held, out: folders and files.
    """

    def __init__(self, base: Path, rows: Path, held: Path, out: Path) -> None:
        self.base, self.rows, self.held, self.out = base, rows, held, out
        launch = launched()
        self.rank, self.size = (launch.rank, launch.size) if launch else (0, 1)
        self.facts: dict[str, Any] = {}

    def train(self, folder: str, method: str, **options: Any) -> None:
        """One training; a refusal is noted by its code."""
        name, config = METHODS[method]
        if method in ("lora", "qlora"):
            config = config | {"dropout": options.pop("dropout", 0.0)}
        given: dict[str, Any] = {"validation_data": self.held} | OPTIONS | options
        rows = given.pop("rows", self.rows)
        try:
            hubkit.train(
                self.base, rows, self.out / folder, method=name, config=config, name="x", device="cpu", **given,
            )  # fmt: skip
        except HubkitError as error:
            self.facts[folder] = error.code
        except KeyboardInterrupt:
            self.facts[folder] = "interrupt"

    def methods(self) -> None:
        """Every method, whole and divided."""
        for method in METHODS:
            self.train(method, method)
            if self.size > 1:
                self.train(f"{method}-shard", method, shard=True)
            if self.size > 1 and method in LATE:
                with patch("hubkit.training.ranks.loading.skeleton", lambda *arguments: None):
                    self.train(f"{method}-late", method, shard=True)
        self.train("dropout", "lora", dropout=0.3)
        self.train("recomputed", "lora", checkpointing=True, shard=self.size > 1)

    def tasks(self) -> None:
        """Labels of rows, by a head that is made."""
        given = {"task": "classification", "validation_data": self.held.with_name("labelled-held.jsonl")}
        self.train("task", "lora", rows=self.rows.with_name("labelled.jsonl"), **given)
        if self.size > 1:
            self.train("task-shard", "lora", rows=self.rows.with_name("labelled.jsonl"), shard=True, **given)

    def resumed(self) -> None:
        """One stopped by Ctrl-C in one process, a copy of what it left, and one gone on with."""
        with self.interrupting():
            self.train("resumed", "lora", dropout=0.3)
        if self.rank == 0:
            shutil.copytree(self.out / "resumed.run", self.out / "stopped.run")
        self.train("resumed", "lora", dropout=0.3, resume=True)

    def foreign(self, stopped: Path) -> None:
        """Goes on with what another number of processes has left."""
        if self.rank == 0:
            shutil.copytree(stopped, self.out / "foreign.run")
        self.train("foreign", "lora", dropout=0.3, resume=True)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, the last process gets Ctrl-C at the beginning of its step after `STOP`."""
        calls, before = [0], stepper.Stepper.step

        def step(own: Any, *arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == STOP + 1 and self.rank == self.size - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return before(own, *arguments)

        stepper.Stepper.step = step  # type: ignore
        try:
            yield
        finally:
            stepper.Stepper.step = before  # type: ignore

    def broken(self) -> None:
        """A loss that is no number, and a process that fails alone."""
        self.train("nan", "lora", learning_rate=1e30, clip=0.0, warmup=0.0)
        before = stepper.Stepper._loss

        def loss(own: Any, batch: Any) -> Any:
            if self.rank == self.size - 1:
                raise HubkitError("HK-MEMORY", "there is not enough memory")
            return before(own, batch)

        stepper.Stepper._loss = loss  # type: ignore
        self.train("alone", "lora")
        stepper.Stepper._loss = before  # type: ignore

    def bytes(self) -> None:
        """What of a quantized base lies here before and after it is divided."""
        from torch.distributed.device_mesh import init_device_mesh

        model = load_base(self.base, codec="nf4/64/double", device="cpu")
        layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
        before = sum(t.nbytes for layer in layers for t in _packed(layer))
        divide(model, init_device_mesh("cpu", (self.size,)))
        after = sum(part.to_local().nbytes for layer in layers for part in layer.divided.values())  # type: ignore[attr-defined]
        self.facts["bytes"] = [before, after]


def _packed(layer: QuantLinear) -> list[torch.Tensor]:
    assert layer.packed is not None
    assert layer.packed.nested_absmax is not None
    return [layer.packed.codes, layer.packed.absmax, layer.packed.nested_absmax]


def main(base: Path, rows: Path, held: Path, out: Path, *stopped: Path) -> None:
    """All of it; `stopped`: a run to go on with."""
    runs, launch = Runs(base, rows, held, out), launched()
    with contextlib.ExitStack() as stack:
        if launch is not None:
            stack.enter_context(joined(launch))
        runs.methods()
        runs.tasks()
        runs.resumed()
        for one in stopped:
            runs.foreign(one)
        runs.broken()
        if launch is not None:
            runs.bytes()
        (out / f"facts-{runs.rank}.json").write_text(json.dumps(runs.facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
