"""A QLoRA step, 4x128, r=16 on all linear layers, beside peft + bitsandbytes, bf16, two threads, one process.

Both sides: NF4 with double quantization, bf16 compute, head, embeddings and norms in bf16 (peft's preparation for
training, which puts these in fp32, is left out: it would slow the peer).

python tests/benchmarks/bench_qlora.py MODEL_FOLDER
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_lora import RANK, loop_step, step
from harness import compare, report

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.tensors.fourbit.nf4 import CODEC
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter


def our_model(path: Path) -> Attached:
    ours = Attached(load_base(path, codec=CODEC))
    method = host().load("qlora")
    config = parse_config(method.info.config, {"rank": RANK, "alpha": 32, "dropout": 0.0}, "")
    ours.add("a", Adapter.fresh("a", method, config, ours.sites, 0))
    ours.set_mix("a")
    return ours


def peft_model(path: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=settings, dtype=torch.bfloat16)
    return get_peft_model(model.train(), LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear"))


def main(path: Path) -> None:
    torch.set_num_threads(2)
    ours, theirs = our_model(path), peft_model(path)
    report("QLoRA step 4x128, bare adapter", compare(step(ours), step(theirs), 7), 1.0)
    for attention, name, target in ((False, "own loss", 0.80), (True, "own loss and attention", 0.70)):
        with ExitStack() as stack:
            run = loop_step(ours, stack, attention=attention)
            report(f"QLoRA step 4x128, {name}", compare(run, step(theirs), 7), target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
