"""Peak memory of training, each side in a fresh process: three steps of 4x128, r=16 on all linear layers, bf16.

The peer of a quantized base is peft + bitsandbytes. Its peak contains bitsandbytes itself, so what importing it takes
is printed beside, and the ratio is also given without.

python tests/benchmarks/bench_memory.py MODEL_FOLDER [bf16 nf4]
"""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

SIDES = {
    "bf16": {"adapter": 1.0, "loop": 0.72, "loop, stock attention": 0.72},
    "nf4": {"adapter": 1.0, "loop": 1.0},
}
"""Base -> what is measured beside peft, and the target."""


def now() -> float:
    """Resident set at its highest so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak(base: str, side: str, path: Path) -> None:
    import bench_lora
    import bench_qlora
    import torch

    bench = bench_qlora if base == "nf4" else bench_lora
    torch.set_num_threads(2)
    with ExitStack() as stack:
        if side == "peft":
            run = bench_lora.step(bench.peft_model(path))
        elif side.startswith("loop"):
            run = bench_lora.loop_step(bench.our_model(path), stack, attention=side == "loop")
        else:
            run = bench_lora.step(bench.our_model(path))
        for _ in range(3):
            run()
    print(now())


def imported() -> None:
    """What importing bitsandbytes adds to a process that has the model's code; peft imports it by itself."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    before = now()
    importlib.import_module("bitsandbytes")
    print(now() - before)


def measured(*arguments: str) -> float:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, text=True, stdout=subprocess.PIPE)
    return float(done.stdout.split()[-1])


def main(path: Path, bases: Sequence[str] = tuple(SIDES)) -> None:
    for base in bases:
        peer = measured(str(path), base, "peft")
        for side, target in SIDES[base].items():
            ours = measured(str(path), base, side)
            mark = "met" if ours / peer <= target else "MISSED"
            print(
                f"{f'peak memory of training, {base}, {side}':50s} {ours:7.0f} {peer:7.0f} MB   "
                f"ratio {ours / peer:.3f}   target {target:.2f} {mark}",
                flush=True,
            )
        if base == "nf4":
            extra = measured("imported")
            print(f"  of the peer's, {extra:.0f} MB are bitsandbytes; ratio without {ours / (peer - extra):.3f}")


if __name__ == "__main__":
    if sys.argv[1] == "imported":
        imported()
    elif len(sys.argv) > 3 and sys.argv[2] in SIDES and sys.argv[3] not in SIDES:
        peak(sys.argv[2], sys.argv[3], Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:] or tuple(SIDES))
