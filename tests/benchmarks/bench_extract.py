"""`hubkit extract` beside mergekit-extract-lora on merges of one adapter, each in a process of its own.

python tests/benchmarks/bench_extract.py MODEL_FOLDER ADAPTER_FOLDER MERGEKIT_BIN [ROUNDS]

MERGEKIT_BIN is the bin folder of an environment of its own with mergekit in it. The adapter is merged in float32 and in
the model's dtype; each merge is extracted at twice the adapter's rank. Errors are of the change of all linear layers
together, ‖taken - adapter's‖ / ‖adapter's‖, and of the worst one; bytes are of the file that holds the tensors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hubkit.artifact.folder import open_adapter
from hubkit.verbs.merge import merge

FILE = "adapter_model.safetensors"


def changes(adapter: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """Module -> B A, of an adapter in PEFT's form."""
    tensors = {name.removeprefix("base_model.model."): t.double() for name, t in load_file(adapter / FILE).items()}
    ends = (".lora_A.weight", ".lora_B.weight")
    modules = sorted(name.removesuffix(ends[0]) for name in tensors if name.endswith(ends[0]))
    return {name: scale * tensors[name + ends[1]] @ tensors[name + ends[0]] for name in modules}


def errors(taken: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, float]:
    """Over all modules together, and of the worst one."""
    missed = {
        name: torch.linalg.norm(taken[name] - delta) if name in taken else delta.norm() for name, delta in want.items()
    }
    total = sum(float(delta.norm()) ** 2 for delta in want.values())
    worst = max(float(missed[name] / delta.norm()) for name, delta in want.items())
    return (sum(float(one) ** 2 for one in missed.values()) / total) ** 0.5, worst


def run(command: list[str], out: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one process that writes `out` anew."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return time.perf_counter() - start, used.ru_utime + used.ru_stime


def main(base: Path, adapter: Path, theirs: Path, rounds: int) -> None:
    config = open_adapter(adapter).manifest.config
    rank = 2 * int(config["rank"])
    want = changes(adapter, float(config["alpha"]) / float(config["rank"]))
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", None):
            tuned = Path(folder) / f"tuned-{dtype}"
            merge(base, adapter, tuned, dtype=dtype)
            outs = {name: Path(folder) / name for name in ("hubkit", "mergekit")}
            ours = [sys.executable, "-m", "hubkit", "extract", "--base", str(base), "--tuned", str(tuned)]
            peer = [str(theirs / "mergekit-extract-lora"), "--base-model", str(base), "--model", str(tuned)]
            commands = {
                "hubkit": [*ours, "--rank", str(rank), "--out", str(outs["hubkit"])],
                "mergekit": [*peer, "--max-rank", str(rank), "--out-path", str(outs["mergekit"])],
            }
            times = [{name: run(command, outs[name]) for name, command in commands.items()} for _ in range(rounds)]
            for name, out in outs.items():
                wall, cpu = (sorted(one[name][i] for one in times)[rounds // 2] for i in range(2))
                total, worst = errors(changes(out), want)
                size = (out / FILE).stat().st_size / 1e6
                kind = dtype or "as stored"
                print(f"{kind:10s} {name:9s} {wall:6.1f} s wall {cpu:6.1f} s CPU", end="")
                print(f"  error {total:.1e}, worst {worst:.1e}  {size:6.1f} MB", flush=True)


if __name__ == "__main__":
    model, chosen, tools = map(Path, sys.argv[1:4])
    main(model, chosen, tools, int(sys.argv[4]) if len(sys.argv) > 4 else 3)
