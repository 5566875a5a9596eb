"""Prefix tuning (20 tokens) beside peft's, on the real 135M model, bf16, two threads, one process.

python tests/benchmarks/bench_prefix.py MODEL_FOLDER [step loop prompt ...]
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_lora import loop_step, step
from harness import compare, report

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter

LENGTH = 20


def our_model(path: Path, name: str) -> Attached:
    ours = Attached(load_base(path))
    method = host().load(name)
    config = parse_config(method.info.config, {"num_virtual_tokens": LENGTH}, "")
    ours.add("a", Adapter.fresh("a", method, config, ours.sites, 0))
    ours.set_mix("a")
    return ours


def peft_model(path: Path, name: str) -> Any:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    kind = PrefixTuningConfig if name == "prefix" else PromptTuningConfig
    return get_peft_model(load_base(path), kind(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))


def main(path: Path, names: list[str]) -> None:
    torch.set_num_threads(2)
    for method in ("prefix", "prompt"):
        chosen = [name for name in names if name != "prompt"] if method == "prefix" or "prompt" in names else []
        if not chosen:
            continue
        ours, theirs = our_model(path, method), peft_model(path, method)
        if "step" in chosen:
            report(f"{method} train step 4x128, bare adapter", compare(step(ours), step(theirs), 9), 1.05)
        if "loop" in chosen:
            with ExitStack() as stack:
                figures = compare(loop_step(ours, stack), step(theirs), 9)
                report(f"{method} train step 4x128, hubkit's loop", figures, 0.80)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["step", "loop", "prompt"])
