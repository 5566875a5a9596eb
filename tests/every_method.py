"""One small configuration of every method, and a model that has an adapter of each."""

from __future__ import annotations

from typing import Any

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import randomize
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Stack, Sum

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 2}),
    "pissa": ("lora", {"rank": 2, "init": "pissa"}),
    "olora": ("lora", {"rank": 2, "init": "olora"}),
    "heads": ("lora", {"rank": 2, "modules_to_save": ["lm_head"]}),
    "tokens": ("lora", {"rank": 2, "add_tokens": ["<one>", "<two>"]}),
    "dora": ("dora", {"rank": 2}),
    "qlora": ("qlora", {"rank": 2}),
    "adapters": ("adapters", {"width": 4}),
    "prefix": ("prefix", {"num_virtual_tokens": 3}),
    "prompt": ("prompt", {"num_virtual_tokens": 3}),
    "selective": ("selective", {"weights": ["input_layernorm"]}),
    "full": ("full", {"targets": ["q_proj", "down_proj"]}),
}
ROUTE: list[Mix | None] = ["lora", "dora", None, "prefix", Sum({"lora": 0.5, "full": -1.0}), Stack(["full", "dora"])]


def random_adapters(model: Any, names: tuple[str, ...] = tuple(METHODS)) -> Attached:
    """`model` with a random adapter of each method that is no quantizing one and adds no tokens."""
    attached = Attached(model)
    for seed, name in enumerate(names):
        if name in ("qlora", "tokens"):
            continue
        method, values = METHODS[name]
        loaded = host().load(method)
        config = parse_config(loaded.info.config, values, "test")
        attached.add(name, randomize(Adapter.fresh(name, loaded, config, attached.sites, seed), seed))
    return attached.eval()
