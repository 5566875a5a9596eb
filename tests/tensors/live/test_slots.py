"""Adapters in the slots of a compiled forward: the same answers, and nothing is compiled twice."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import refused
from zoo import ids, model_of, near

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import randomize
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.slots import Compiled
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Sum


class Counting:
    """A backend of torch.compile that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


def make(attached: Attached, seed: int, **values: Any) -> Adapter:
    method = host().load(str(values.pop("method", "lora")))
    config = parse_config(method.info.config, values, "test")
    made = randomize(Adapter.fresh(f"a{seed}", method, config, attached.sites, seed), seed)
    for parameter in made.parameters().values():
        parameter.requires_grad_(False).mul_(0.3)  # large ones are so steep that fp32's own rounding shows
    return made


@pytest.fixture
def attached() -> Attached:
    """A tiny Llama with adapters of ranks 2 and 3 on all linear layers, and one on some."""
    made = Attached(model_of("llama"))
    made.add("a", make(made, 1, rank=2))
    made.add("b", make(made, 2, rank=3, rslora=True))
    made.add("few", make(made, 3, rank=1, targets=["q_proj"]))
    return made.eval()


@pytest.fixture
def backend() -> Counting:
    torch._dynamo.reset()
    return Counting()


def test_routes_and_swaps_compile_nothing_again(attached: Attached, backend: Counting) -> None:
    compiled = attached.compiled(2, 3, backend=backend, fullgraph=True)
    rows = ids(3, 6)
    with torch.no_grad():
        for route in (["a", None, "b"], ["few", "few", "a"], [None, None, None], ["b", "few", "b"]):
            near(compiled(rows, route=route).logits, attached(rows, route=route).logits)
        assert backend.graphs == 1
        attached.swap("a", make(attached, 7, rank=3, alpha=5))
        near(compiled(rows, route=["a", "b", None]).logits, attached(rows, route=["a", "b", None]).logits)
        attached.offer("later", lambda: make(attached, 9, rank=2))
        near(compiled(rows, route=["later", "b", "b"]).logits, attached(rows, route=["later", "b", "b"]).logits)
        attached.set_mix("b")
        near(compiled(rows).logits, attached(rows).logits)
    assert backend.graphs == 1


@pytest.mark.slow
def test_where_a_forward_is_not_compiled_whole(attached: Attached, backend: Counting) -> None:
    layer: Any = attached.model.get_submodule("model.layers.1.mlp")
    layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[no-untyped-call]
    compiled = attached.compiled(2, 3, backend=backend)
    attached.set_mix("few")
    rows = ids(3, 6)
    with torch.no_grad():
        for route in (["a", None, "b"], ["b", "b", "a"]):
            near(compiled(rows, route=route).logits, attached(rows, route=route).logits)
    assert backend.graphs > 1


def test_calls_from_several_threads_keep_their_slots(attached: Attached, backend: Counting) -> None:
    """More adapters than one call's slots: who is in use is never overwritten."""
    compiled = attached.compiled(3, 3, backend=backend)
    rows = ids(2, 6)
    routes: list[list[str | None]] = [["a", "b"], ["b", None], ["few", "b"]]
    with torch.no_grad():
        want = [attached(rows, route=route).logits for route in routes]
        compiled(rows, route=routes[0])
    wrong: list[float] = []

    def call(number: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                have = compiled(rows, route=routes[number]).logits
                if (away := float((have - want[number]).abs().max())) > 1e-4:
                    wrong.append(away)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_no_slot_can_hold(attached: Attached, backend: Counting) -> None:
    compiled = attached.compiled(2, 2, backend=backend)
    rows = ids(3, 6)
    assert "rank 3" in str(refused("HK-SLOTS", compiled, rows, route=["a", "b", None]).have)
    attached.swap("b", make(attached, 5, rank=1))
    refused("HK-SLOTS", compiled, rows, route=["a", "b", "few"])
    refused("HK-ROUTE", compiled, rows, route=["a", "b"])
    refused("HK-ROUTE", compiled, rows, route=[])
    refused("HK-ROUTE", compiled, attention_mask=torch.ones(3, 6), route=["a", "b", None])
    refused("HK-UNKNOWN-ADAPTER", compiled, rows, route=["a", "x", None])
    refused("HK-SLOTS", compiled, rows, route=[Sum(["a"]), None, None])
    attached.set_mix(Sum({"a": 0.5}))
    refused("HK-SLOTS", compiled, rows)
    attached.add("dora", make(attached, 5, rank=2, method="dora"))
    assert "q_proj" in str(refused("HK-SLOTS", compiled, rows, route=["dora", None, None]).have)
    with torch.no_grad():
        near(compiled(rows, route=["a", None, "b"]).logits, attached(rows, route=["a", None, "b"]).logits)
    attached.compiled(2, 2, backend=backend)
    refused("HK-SLOTS", compiled, rows, route=["a", None, None])
    attached.add("prefix", make(attached, 1, method="prefix"))
    refused("HK-SLOTS", attached.compiled)


def test_a_base_without_adapters_has_nothing_to_compile() -> None:
    refused("HK-SLOTS", Attached(model_of("llama")).compiled)


@pytest.mark.slow
def test_with_the_compiler_of_torch(attached: Attached) -> None:
    torch._dynamo.reset()
    compiled: Compiled = attached.compiled(2, 3)
    rows = ids(3, 6)
    with torch.no_grad():
        for route in (["a", None, "b"], ["few", "b", None]):
            near(compiled(rows, route=route).logits, attached(rows, route=route).logits)
