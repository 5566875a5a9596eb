"""A training step and a forward of LoRA at the experts of a mixture, beside peft's ``target_parameters``.

    python tests/benchmarks/bench_experts.py

Random weights: eight experts of 1024 by 512 in each of four layers, two for each token; rank 8, 512 tokens, fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import compare, report
from torch import Tensor

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter

RANK = 8
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2000,
}


def mixture() -> Any:
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MixtralConfig(**SIZES)).train()


def ours() -> Any:
    attached = Attached(mixture())
    method = host().load("lora")
    settings = parse_config(method.info.config, {"rank": RANK, "targets": r".*experts.*"}, "bench")
    attached.add("a", Adapter.fresh("a", method, settings, attached.sites, 0))
    attached.set_mix("a")
    return attached.train()


def theirs() -> Any:
    import peft

    config = peft.LoraConfig(
        r=RANK,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.gate_up_proj": 2 * RANK},
    )
    return peft.get_peft_model(mixture(), config).train()


def step(model: Any, ids: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def forward(model: Any, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    return run


def main() -> None:
    ids = torch.randint(0, 2000, (2, 256), generator=torch.Generator().manual_seed(1))
    one, other = ours(), theirs()
    report("experts: training step", compare(step(one, ids), step(other, ids)), 1.0)
    report("experts: forward", compare(forward(one.eval(), ids), forward(other.eval(), ids)), 1.0)


if __name__ == "__main__":
    main()
