"""Planning a base of 100 layers with 128 experts each from its headers, beside its model: seconds and memory.

python tests/benchmarks/bench_plan.py
"""

from __future__ import annotations

import gc
import resource
import time
from typing import Any

import torch

from hubkit.artifact.identity.header import TensorInfo
from hubkit.compat.transformers_names import as_in_files
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.reading import planned
from hubkit.tensors.base.agreement import require_agreement
from hubkit.tensors.base.base import Base

TARGETS = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def outline() -> Any:
    """A mixture of the size, narrow, on the meta device."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"num_hidden_layers": 100, "num_experts": 128, "hidden_size": 256, "moe_intermediate_size": 64}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, vocab_size=1000))


def peak() -> float:
    """The largest memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    model = outline()
    config = model.config.to_dict()
    stored = as_in_files(model, model.state_dict())
    headers = {name: TensorInfo(name, "BF16", tuple(tensor.shape), 0, 0) for name, tensor in stored.items()}
    method = host().load("lora")
    settings = parse_config(method.info.config, TARGETS, "bench")
    del model, stored
    gc.collect()
    before, begun = peak(), time.perf_counter()
    files = Base.from_headers(headers, config, "bench")
    live = Base.from_model(outline())
    require_agreement(planned(method, settings, files).sites, planned(method, settings, live).sites, files, live)
    seconds = time.perf_counter() - begun
    print(f"plan of {len(headers)} tensors: {seconds:.2f} s (wanted 2), {peak() - before:.0f} MB more (wanted 150)")


if __name__ == "__main__":
    main()
