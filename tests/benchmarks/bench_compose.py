"""Composing three rank-16 adapters on all linear layers of the real 135M model, beside peft's ``add_weighted_adapter``.

python tests/benchmarks/bench_compose.py MODEL_FOLDER [svd ties ...]

Ours is timed over all 210 sites. Peft takes a full SVD of every delta, so it is timed on the 21 linear layers of three
blocks, and compared per linear layer: all blocks have the same shapes. Only the arithmetic is timed on both sides, not
reading and writing. The errors are of the composed deltas, beside the best error of that rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import compare

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.weights.composing import Composition, compose_deltas, compose_options

RANK, LAYERS = 16, ("layers.0.", "layers.10.", "layers.20.")
WEIGHTS = {"a": 1.0, "b": 0.7, "c": 0.5}
DENSITY = 0.2
TARGETS = {"svd": (60, "sum"), "ties": (12, "ties")}


def our_adapters(base: Base) -> dict[str, Adapter]:
    """Three random adapters: a flat spectrum, the hardest case for a randomized SVD."""
    method = host().load("lora")
    config = parse_config(method.info.config, {"rank": RANK, "alpha": 32}, "")
    made = {name: Adapter.fresh(name, method, config, base, seed) for seed, name in enumerate(WEIGHTS)}
    for seed, adapter in enumerate(made.values()):
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters().values():
            parameter.data.normal_(0, 0.02, generator=generator)
            parameter.requires_grad_(False)
    return made


def our_run(base: Base, adapters: dict[str, Adapter], operator: str) -> Callable[[], Composition]:
    how = compose_options(operator, DENSITY if operator == "ties" else None, rank=RANK)
    return lambda: compose_deltas(base.sites.values(), list(WEIGHTS.items()), lambda n, at: adapters[n].delta(at), how)


def peft_model(path: Path, adapters: dict[str, Adapter]) -> tuple[Any, int]:
    """The same three adapters at the layers of `LAYERS`, fp32; and how many layers these are."""
    from peft import LoraConfig, get_peft_model

    model = load_base(path)
    chosen = [name for name in adapters["a"].parts if any(layer in name for layer in LAYERS)]
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=chosen)
    made = get_peft_model(model, config, adapter_name="a")
    made.add_adapter("b", config)
    made.add_adapter("c", config)
    modules = dict(made.base_model.model.named_modules())
    for name, adapter in adapters.items():
        for site in chosen:
            modules[site].lora_A[name].weight.data = adapter.parts[site].get_parameter("A").data.clone()
            modules[site].lora_B[name].weight.data = adapter.parts[site].get_parameter("B").data.clone()
    return made, len(chosen)


def peft_run(model: Any, kind: str) -> Callable[[], None]:
    combination = {"svd": "svd", "ties": "ties_svd"}[kind]

    def run() -> None:
        model.add_weighted_adapter(
            list(WEIGHTS),
            list(WEIGHTS.values()),
            "mixed",
            combination_type=combination,
            svd_rank=RANK,
            density=DENSITY if kind == "ties" else None,
        )
        model.delete_adapter("mixed")

    return run


def agreement(model: Any, kind: str, ours: Composition) -> tuple[float, float]:
    """‖ours - full‖ / ‖peft's - full‖ at the worst site timed, full being peft's delta before its SVD; and how far the
    two results are apart."""
    from peft.utils.merge_utils import task_arithmetic, ties

    modules = dict(model.base_model.model.named_modules())
    combination = {"svd": "svd", "ties": "ties_svd"}[kind]
    model.add_weighted_adapter(
        list(WEIGHTS),
        list(WEIGHTS.values()),
        "mixed",
        combination_type=combination,
        svd_rank=RANK,
        density=DENSITY if kind == "ties" else None,
    )
    weights = torch.tensor(list(WEIGHTS.values()))
    worst = apart = 0.0
    for site, (left, right) in ours.factors.items():
        if any(layer in site for layer in LAYERS):
            module = modules[site]
            deltas = [module.get_delta_weight(name).detach() for name in WEIGHTS]
            full = task_arithmetic(deltas, weights) if kind == "svd" else ties(deltas, weights, DENSITY)
            theirs = module.get_delta_weight("mixed").detach()
            worst = max(worst, float((left @ right - full).norm() / (theirs - full).norm()))
            apart = max(apart, float((left @ right - theirs).norm() / theirs.norm()))
    model.delete_adapter("mixed")
    return worst, apart


def main(path: Path, kinds: list[str]) -> None:
    torch.set_num_threads(2)
    base = Base.from_folder(path)
    adapters = our_adapters(base)
    model, count = peft_model(path, adapters)
    for kind in kinds:
        target, operator = TARGETS[kind]
        run = our_run(base, adapters, operator)
        a, b, ratio = compare(run, peft_run(model, kind), 7)
        sites = len(adapters["a"].parts)
        times = sites / count / ratio
        mine, theirs = a / sites * 1e3, b / count * 1e3
        mark = "met" if times >= target else "MISSED"
        print(
            f"compose three rank-16 adapters, {kind:5s} {mine:8.2f} {theirs:8.1f} ms per linear layer   "
            f"{times:.0f} times faster   target {target} {mark}",
            flush=True,
        )
        worst, apart = agreement(model, kind, run())
        print(f"    error beside peft's {worst:.6f}   apart {apart:.1e}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(TARGETS))
