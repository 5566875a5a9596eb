"""What each method learns on the same rows, each run in a process of its own: one table, a row at a time.

python tests/benchmarks/learn.py MODEL_FOLDER [--steps N] [--log FILE] [VARIANT ...]

A variant is a method, then what differs from its shipped recipe, options of the method and of the run alike:
'prefix init=zero learning_rate=0.1'. None named: every installed method as it ships. `--log` appends the figures as
JSON lines, so that a run that is broken off keeps its rows, and the next one goes on with those that are not there yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent.parent / "examples" / "data"
WORDS = ("schedule", "dtype")
"""Options of training that are no numbers."""
GENERAL = 32
"""Rows on which is measured what training forgot."""


def train(base: Path, steps: int, variant: str) -> None:
    """One line of JSON: the figures of one run."""
    import hubkit
    from hubkit.training.events import Event, Stepped
    from hubkit.training.options import TrainOptions

    method, *words = shlex.split(variant)
    given: dict[str, Any] = dict(word.split("=", 1) for word in words)
    known = {field.name for field in dataclasses.fields(TrainOptions)}
    options = {key: value if key in WORDS else json.loads(value) for key, value in given.items() if key in known}
    config = {key: value for key, value in given.items() if key not in known}
    stamps: list[float] = []

    def report(event: Event) -> None:
        if isinstance(event, Stepped):
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / method
        run = hubkit.train(
            str(base),
            DATA / "e2e_train.jsonl",
            out,
            method=method,
            config=config,
            steps=steps,
            eval_every=steps,
            validation_data=DATA / "e2e_heldout.jsonl",
            report=report,
            **options,
        )
        size = (out / "adapter_model.safetensors").stat().st_size
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        forgotten = forgetting(base, out)
    figures = {
        "variant": variant,
        "steps": steps,
        "before": run.metrics.untrained_loss,
        "after": run.metrics.validation_loss,
        "forgetting": forgotten,
        "parameters": run.parameters,
        "bytes": size,
        "peak": peak,
        "seconds": statistics.median(b - a for a, b in itertools.pairwise(stamps)),
    }
    print(json.dumps(figures))


def forgetting(base: Path, adapter: Path) -> float:
    """Nats a token that general rows (problems of GSM8K, of which the task says nothing) cost more than before."""
    import torch

    import hubkit

    tokenizer = hubkit.load_tokenizer(base)
    lines = (DATA / "gsm8k_heldout.jsonl").read_text("utf-8").splitlines()[:GENERAL]
    rows = [json.loads(line) for line in lines]
    texts = [tokenizer(f"{row['prompt']}\n{row['completion']}", return_tensors="pt") for row in rows]
    tokens = sum(int(text["input_ids"].shape[1]) - 1 for text in texts)

    def loss(model: Any) -> float:
        total = 0.0
        with torch.no_grad():
            for text in texts:
                total += float(model(**text, labels=text["input_ids"]).loss) * (text["input_ids"].shape[1] - 1)
        return total / tokens

    model = hubkit.load_base(base)
    before: float = loss(model)
    return loss(hubkit.attach(model, str(adapter), base=str(base))) - before


def table(base: Path, steps: int, variants: list[str], log: Path | None) -> None:
    """Prints one row after another; rows that `log` holds are not computed again."""
    print("| method | held-out before | after | forgetting | trained parameters | s per step | peak MB | file MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    lines = log.read_text().splitlines() if log and log.exists() else []
    known = {(f["variant"], f["steps"]): f for f in map(json.loads, lines)}
    for variant in variants:
        f = known.get((variant, steps))
        if f is None:
            command = [sys.executable, __file__, str(base), "--steps", str(steps), "--row", variant]
            done = subprocess.run(command, text=True, capture_output=True)
            if done.returncode:
                print(f"{variant}: {done.stderr}", file=sys.stderr)
                continue
            f = json.loads(done.stdout.splitlines()[-1])
            if log:
                with log.open("a") as file:
                    file.write(json.dumps(f) + "\n")
        print(
            f"| {variant} | {f['before']:.3f} | {f['after']:.3f} | {f.get('forgetting', math.nan):+.3f} | "
            f"{f['parameters']:,} | {f['seconds']:.2f} | {f['peak'] / 1024:.0f} | {f['bytes'] / 1e6:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("variants", nargs="*")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    asked = parser.parse_intermixed_args()
    if asked.row:
        train(asked.base, asked.steps, asked.row)
        return
    from hubkit.methods.host import host

    table(asked.base, asked.steps, asked.variants or sorted(host().offers()), asked.log)


if __name__ == "__main__":
    main()
