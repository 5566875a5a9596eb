"""A batch whose rows have different LoRA adapters, r=16 on all linear layers, beside the bare base; swaps; many.

python tests/benchmarks/bench_route.py MODEL_FOLDER [decode prefill peft swap many ...]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_lora import RANK, forward, saved, tokens
from harness import compare, report

from hubkit.artifact.folder import open_adapter
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.reading import read_adapter
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Route

ROWS = 16


def adapter(attached: Attached, seed: int) -> Adapter:
    """Ready to answer: in the base's dtype, frozen, not the identity."""
    method = host().load("lora")
    made = Adapter.fresh(f"a{seed}", method, parse_config(method.info.config, {"rank": RANK}, ""), attached.sites, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.parameters().items():
            if name.endswith("B"):
                parameter.normal_(0, 0.01, generator=generator)
    made.to_compute_dtype()
    return made


def routed(path: Path) -> Attached:
    attached = Attached(load_base(path))
    for seed in range(ROWS):
        attached.add(f"a{seed}", adapter(attached, seed))
    attached.set_mix(Route([f"a{seed}" for seed in range(ROWS)]))
    return attached


def decode(model: Any, count: int = 16) -> Callable[[], None]:
    """`count` steps of one token per row behind the first, with the cache; the model is in eval mode already."""
    ids = tokens(ROWS, 1)
    model.eval()

    def run() -> None:
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            for _ in range(count):
                out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)

    return run


def peft_forward(path: Path, length: int) -> Callable[[], None]:
    """peft's mixed batch, which is for generation without a cache."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(load_base(path), config, adapter_name="a0")
    for seed in range(1, ROWS):
        model.add_adapter(f"a{seed}", config)
    ids = tokens(ROWS, length)

    def run() -> None:
        with torch.no_grad():
            model.eval()(input_ids=ids, adapter_names=[f"a{seed}" for seed in range(ROWS)])

    return run


def median(call: Callable[[], object], rounds: int) -> float:
    """Milliseconds of one call, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def swaps(path: Path) -> None:
    attached = Attached(load_base(path))
    ready = [adapter(attached, seed) for seed in range(2)]
    attached.add("a", ready[0])
    attached.set_mix("a")
    turn = iter(range(10**6))
    print(
        f"swap a 20 MB adapter from memory: {median(lambda: attached.swap('a', ready[next(turn) % 2]), 15):.1f} ms (10)"
    )
    folder = open_adapter(saved(path))

    def from_file() -> None:
        attached.swap("a", read_adapter(folder, attached.sites, name="a", dtype="base"))

    print(f"swap a 20 MB adapter from its file: {median(from_file, 15):.1f} ms (50)")


def additions(path: Path) -> None:
    """Rank 1, so that 500 of them fit; what grows with their number shows all the same."""
    attached = Attached(load_base(path))
    method = host().load("lora")
    config = parse_config(method.info.config, {"rank": 1}, "")
    one = Adapter.fresh("a", method, config, attached.sites, 0)
    one.to_compute_dtype()
    with tempfile.TemporaryDirectory() as folder:
        from safetensors.torch import save_file

        file = Path(folder) / "w"
        save_file(one.tensors(), file)
        times = []
        for number in range(500):
            start = time.perf_counter()
            attached.add(f"a{number}", Adapter.read("a", method, config, attached.sites, file, "base"))
            attached.set_mix(f"a{number}")
            times.append(time.perf_counter() - start)
    early, late = (statistics.median(times[a:b]) * 1e3 for a, b in ((4, 24), (480, 500)))
    print(
        f"adding an adapter, the 5th to 24th {early:.1f} ms, the 481st to 500th {late:.1f} ms: {late / early:.2f} (1.0)"
    )


def main(path: Path, names: list[str]) -> None:
    torch.set_num_threads(2)
    if "swap" in names:
        swaps(path)
    if "many" in names:
        additions(path)
    if not {"decode", "prefill", "peft"} & set(names):
        return
    ours, base = routed(path), load_base(path)
    if "decode" in names:
        report("decode 16x1, 16 adapters, beside the base", compare(decode(ours), decode(base), 15), 1.40)
    if "prefill" in names:
        report(
            "prefill 16x64, 16 adapters, beside the base",
            compare(forward(ours, ROWS, 64), forward(base, ROWS, 64), 9),
            1.20,
        )
    if "peft" in names:
        report("the same beside peft's mixed batch", compare(forward(ours, ROWS, 64), peft_forward(path, 64), 7), 1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["swap", "many", "decode", "prefill", "peft"])
