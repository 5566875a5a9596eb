"""Peak memory of training, each side in a fresh process: three steps of 4x128, r=16 on all linear layers, bf16.

python tests/benchmarks/bench_memory.py MODEL_FOLDER
"""

from __future__ import annotations

import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path


def peak(side: str, path: Path) -> None:
    import bench_lora
    import torch

    torch.set_num_threads(2)
    with ExitStack() as stack:
        if side == "peft":
            run = bench_lora.step(bench_lora.peft_model(path))
        elif side.startswith("loop"):
            run = bench_lora.loop_step(bench_lora.our_model(path), stack, attention=side == "loop")
        else:
            run = bench_lora.step(bench_lora.our_model(path))
        for _ in range(3):
            run()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(path: Path) -> None:
    found = {}
    for side in ("peft", "adapter", "loop", "loop, stock attention"):
        done = subprocess.run(
            [sys.executable, __file__, str(path), side], check=True, text=True, stdout=subprocess.PIPE
        )
        found[side] = float(done.stdout.split()[-1])
    for side, target in (("adapter", 1.0), ("loop", 0.72), ("loop, stock attention", 0.72)):
        ratio = found[side] / found["peft"]
        mark = "met" if ratio <= target else "MISSED"
        print(
            f"{'peak memory of training, ' + side:44s} {found[side]:9.0f} {found['peft']:9.0f} MB   "
            f"ratio {ratio:.3f}   target {target:.2f} {mark}"
        )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        peak(sys.argv[2], Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]))
