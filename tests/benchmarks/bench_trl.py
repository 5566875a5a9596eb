"""A training, and the same packed, beside TRL's SFTTrainer: LoRA r=16 on all linear layers, the same rows and settings.

python tests/benchmarks/bench_trl.py MODEL_FOLDER [--steps N] [--rounds N] [--rows FILE]

Each run is a process of its own, in turn: seconds of the median step, of the whole, and the peak of its memory. Both
take the loss on completions only, without checkpointing, in bf16, 4 rows a step, the same rate and schedule.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DATA = Path(__file__).parent.parent.parent / "examples" / "data"
RANK, ROWS, RATE, LONGEST = 16, 4, 1e-3, 512


def hubkit_run(base: Path, rows: Path, steps: int, stamp: Callable[[], None], packing: bool = False) -> float:
    """Trains by hubkit; returns the loss on the last steps."""
    import hubkit
    from hubkit.training.events import Event, Stepped

    def report(event: Event) -> None:
        if isinstance(event, Stepped):
            stamp()

    with tempfile.TemporaryDirectory() as folder:
        done = hubkit.train(
            str(base),
            rows,
            Path(folder) / "a",
            config={"rank": RANK, "targets": "all-linear"},
            steps=steps,
            batch_size=ROWS,
            learning_rate=RATE,
            schedule="linear",
            warmup=0.0,
            max_length=LONGEST,
            packing=packing,
            report=report,
        )
    return done.metrics.loss


def trl_run(base: Path, rows: Path, steps: int, stamp: Callable[[], None]) -> float:
    """Trains by TRL; returns the mean loss."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Stamping(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            stamp()

    records = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    chats = [
        {
            "prompt": [{"role": "user", "content": record["prompt"]}],
            "completion": [{"role": "assistant", "content": record["completion"]}],
        }
        for record in records
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16),
            args=SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=ROWS,
                learning_rate=RATE,
                max_length=LONGEST,
                gradient_checkpointing=False,
                bf16=True,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(chats),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Stamping()],
        )
        result = trainer.train()
        trainer.save_model(folder)
    return float(result.training_loss)


def run(kind: str, base: Path, rows: Path, steps: int) -> None:
    """One line of JSON: the figures of one run."""
    import torch

    torch.set_num_threads(2)
    stamps: list[float] = []

    def stamp() -> None:
        stamps.append(time.perf_counter())

    begun = time.perf_counter()
    if kind == "trl":
        loss = trl_run(base, rows, steps, stamp)
    else:
        loss = hubkit_run(base, rows, steps, stamp, kind == "packed")
    spent = time.perf_counter() - begun
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
    step = statistics.median(b - a for a, b in itertools.pairwise(stamps))
    print(json.dumps({"step": step, "whole": spent, "peak": peak, "loss": loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rows", type=Path, default=DATA / "e2e_train.jsonl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.kind:
        run(asked.kind, asked.base, asked.rows, asked.steps)
        return
    found: dict[str, list[dict[str, float]]] = {"hubkit": [], "packed": [], "trl": []}
    for _ in range(asked.rounds):
        for kind, runs in found.items():
            command = [sys.executable, __file__, str(asked.base), "--rows", str(asked.rows)]
            command += ["--steps", str(asked.steps), "--kind", kind]
            done = subprocess.run(command, text=True, capture_output=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for kind, runs in found.items():
        step, whole, peak = (statistics.median(one[what] for one in runs) for what in ("step", "whole", "peak"))
        ratio = statistics.median(a["step"] / b["step"] for a, b in zip(runs, found["trl"], strict=True))
        print(
            f"{kind:8s} step {step * 1e3:7.0f} ms   ratio {ratio:.2f}   whole {whole:6.1f} s   peak {peak:.0f} MiB"
            f"   loss {runs[0]['loss']:.3f}"
        )


if __name__ == "__main__":
    main()
