"""What every method learns at its shipped recipe, on the same rows, each in a process of its own: one table.

python tests/benchmarks/learn.py MODEL_FOLDER [STEPS]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path(__file__).parent.parent.parent / "examples" / "data"


def train(base: Path, method: str, steps: int) -> None:
    """One line of JSON: the figures of one run."""
    import hubkit

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / method
        run = hubkit.train(
            str(base), DATA / "e2e_train.jsonl", out, method=method, steps=steps, eval_every=steps,
            validation_data=DATA / "e2e_heldout.jsonl",
        )  # fmt: skip
        size = (out / "adapter_model.safetensors").stat().st_size
    figures = {
        "before": run.metrics.untrained_loss, "after": run.metrics.validation_loss, "parameters": run.parameters,
        "seconds": run.metrics.seconds / steps, "bytes": size,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip
    print(json.dumps(figures))


def main(base: Path, steps: int) -> None:
    from hubkit.methods.host import host

    print("| method | held-out before | after | trained parameters | s per step | peak MB | file MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for method in sorted(host().offers()):
        command = [sys.executable, __file__, str(base), str(steps), method]
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        f = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {method} | {f['before']:.3f} | {f['after']:.3f} | {f['parameters']:,} | {f['seconds']:.2f} | "
            f"{f['peak'] / 1024:.0f} | {f['bytes'] / 1e6:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    model, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 30
    train(model, sys.argv[3], count) if len(sys.argv) > 3 else main(model, count)
