"""A base of 70B parameters, packed in 4 bits, divided among processes that are not there: ``dry_run.py PROCESSES``.

Prints JSON: bytes with the first of them by FSDP2's own division, and by arithmetic; bytes of the whole; what a step
gathers. Nothing holds values: the model is on `meta`, the group of processes is torch's fake one.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from hubkit.training.ranks.sharding import divide
from hubkit.training.ranks.sizes import bytes_per_process, gathered_at_most, quantize_outline


def main(processes: int) -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    quantize_outline(model)
    facts = {"arithmetic": bytes_per_process(model, processes), "whole": bytes_per_process(model, 1)}
    facts["gathered"] = gathered_at_most(model)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    divide(model, init_device_mesh("cpu", (processes,)))
    facts["divided"] = sum(p.to_local().nbytes for p in model.parameters())
    facts["after"] = bytes_per_process(model, 1)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(int(sys.argv[1]))
