"""DoRA r=16 on all linear layers beside our LoRA and peft's DoRA, on the real 135M model, bf16, two threads.

python tests/benchmarks/bench_family.py MODEL_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from bench_lora import LENGTH, RANK, ROWS, our_model, step
from harness import compare, report

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter


def dora_model(path: Path) -> Attached:
    ours = Attached(load_base(path))
    method = host().load("dora")
    ours.add("a", Adapter.fresh("a", method, parse_config(method.info.config, {"rank": RANK}, ""), ours.sites, 0))
    ours.set_mix("a")
    return ours


def peft_dora(path: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", use_dora=True)
    return get_peft_model(load_base(path), config)


def main(path: Path) -> None:
    torch.set_num_threads(2)
    dora = step(dora_model(path))
    report(f"DoRA step {ROWS}x{LENGTH} beside our LoRA's", compare(dora, step(our_model(path)), 9), 1.25)
    report(f"DoRA step {ROWS}x{LENGTH} beside peft's DoRA", compare(dora, step(peft_dora(path)), 9), 0.75)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
