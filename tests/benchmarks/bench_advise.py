"""What `advise` says of the time of a training, beside a real one: seconds of a few steps, by the tokens they hold.

python tests/benchmarks/bench_advise.py MODEL_FOLDER [--steps N] [--rows FILE] [VARIANT ...]

A variant is a method, rows of a forward pass, forward passes of a step, and `checkpointing` or nothing: 'lora 8 1'.
Each runs in a process of its own with one thread, in seconds of the processor, so that other work on the machine
counts on neither side; with --wall in seconds of the clock, with all threads. The ratio real / said is what `LEAST` and
`MOST` in `hubkit.training.advice.timing` are for: it should lie between them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATA = Path(__file__).parent.parent.parent / "examples" / "data"
VARIANTS = ("lora 8 1", "qlora 8 1", "full 4 2", "lora 8 1 checkpointing", "dora 8 1", "prompt 8 1")


def measure(base: Path, data: Path, steps: int, variant: str, wall: bool) -> None:
    """One line of the table."""
    import torch

    import hubkit
    from hubkit.tensors.base.agreement import outline
    from hubkit.tensors.base.base import Base
    from hubkit.training.advice import timing
    from hubkit.training.advice.activations import Pass
    from hubkit.training.events import Event, Stepped
    from hubkit.verbs.plan import rows_of, settled

    clock = time.perf_counter if wall else time.process_time
    timing.CLOCK = clock
    name, size, passes, *rest = shlex.split(variant)
    batch, accumulate, again = int(size), int(passes), rest == ["checkpointing"]
    rows, model = rows_of(data, base, None, True), outline(base)
    method, settings = settled(name, None, model, None)
    one = Pass(batch, max(len(row.ids) for row in rows), torch.bfloat16)
    training = timing.Training(one, timing.epoch_of(rows, batch, accumulate, 0.0), again)

    def said() -> timing.Took:
        return timing.took(method, settings, Base.from_model(model), model, training, torch.device("cpu"))

    before, stamps = said(), [(clock(), 0)]

    def report(event: Event) -> None:
        if isinstance(event, Stepped):
            stamps.append((clock(), event.tokens))

    with tempfile.TemporaryDirectory() as folder:
        hubkit.train(
            base, data, Path(folder) / "a", method=name, steps=steps, batch_size=batch, accumulate=accumulate,
            checkpointing=again, dtype="bfloat16", device="cpu", report=report,
        )  # fmt: skip
    after = said()
    tokens = sum(count for _, count in stamps[2:])  # the first step warms up
    real = (stamps[-1][0] - stamps[1][0]) / tokens * sum(len(row.ids) for row in rows)
    sure = (before.least + after.least) / 2 / timing.LEAST
    print(f"| {variant} | {sure:.0f} s | {real:.0f} s | {real / sure:.2f} | {after.speed / 1e9:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=Path, default=DATA / "e2e_train.jsonl")
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--one", action="store_true", help="in this process, as the table's own runs are")
    given = parser.parse_args()
    if given.one:
        measure(given.base, given.rows, given.steps, given.variants[0], given.wall)
        return
    print("| training | said, an epoch | real | ratio | GFLOP/s |\n|---|---|---|---|---|", flush=True)
    for variant in given.variants:
        line = [sys.executable, "-W", "ignore", __file__, str(given.base), variant, "--one"]
        line += ["--steps", str(given.steps), "--rows", str(given.rows), *(["--wall"] if given.wall else [])]
        subprocess.run(line, check=True, env=os.environ if given.wall else {**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
