"""Adapters that are read when they are named, and those that are swapped: who asks gets the right one, always."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import refused
from zoo import ids, model_of

from hubkit.errors import HubkitError
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import randomize
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.pool import bytes_of
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Sum


def make(attached: Attached, seed: int, **values: Any) -> Adapter:
    method = host().load("lora")
    config = parse_config(method.info.config, {"rank": 2, **values}, "test")
    made = randomize(Adapter.fresh(f"a{seed}", method, config, attached.sites, seed), seed)
    for parameter in made.parameters().values():
        parameter.requires_grad_(False)
    return made


@pytest.fixture
def attached() -> Attached:
    return Attached(model_of("llama"))


def own(attached: Attached, adapter: Adapter, rows: Tensor) -> Tensor:
    """What the adapter alone computes."""
    alone = Attached(model_of("llama"))
    alone.add("x", adapter)
    alone.set_mix("x")
    out: Tensor = alone(rows).logits
    return out


def test_offered_adapters_are_read_when_named_and_the_least_recently_used_give_way(attached: Attached) -> None:
    read: list[int] = []

    def offer(seed: int) -> None:
        def load() -> Adapter:
            read.append(seed)
            return make(attached, seed)

        attached.offer(f"a{seed}", load)

    for seed in range(5):
        offer(seed)
    attached.memory = 2 * bytes_of(make(attached, 0))
    assert not read
    rows = ids(1, 5)
    want = {seed: own(attached, make(attached, seed), rows) for seed in range(5)}
    with torch.no_grad():
        for seed in (0, 1, 0, 2, 0, 1):
            assert torch.equal(attached(rows, route=[f"a{seed}"]).logits, want[seed])
            assert len(attached.adapters) == len(list(attached.parts)) <= 2
        assert read == [0, 1, 2, 1]
        attached.set_mix("a0")
        for seed in (3, 4):
            assert torch.equal(attached(rows, route=[f"a{seed}"]).logits, want[seed])
            assert "a0" in attached.adapters, "the active mix stays"
        assert torch.equal(attached(rows).logits, want[0])
        before = set(attached.adapters)
        error = refused("HK-MEMORY", attached, ids(2, 5), route=["a1", "a2"])
        assert "a0, a1, a2" in str(error.have)
        assert set(attached.adapters) == before
        assert torch.equal(attached(rows).logits, want[0])
    error = refused("HK-UNKNOWN-ADAPTER", attached, rows, route=["a9"])
    assert "a0, a1, a2, a3, a4" in str(error.want)
    refused("HK-NAME-TAKEN", attached.offer, "a1", lambda: make(attached, 1))
    refused("HK-NAME-TAKEN", attached.add, "a1", make(attached, 1))
    attached.remove("a1")
    refused("HK-UNKNOWN-ADAPTER", attached.set_mix, "a1")


def test_what_cannot_be_read_changes_nothing(attached: Attached) -> None:
    def broken() -> Adapter:
        raise HubkitError("HK-KEYS", "broken")

    attached.add("a", make(attached, 1))
    attached.offer("b", broken)
    attached.offer("c", lambda: make(Attached(model_of("llama", hidden_size=64)), 1))
    attached.set_mix("a")
    rows = ids(2, 5)
    want = attached(rows).logits
    refused("HK-KEYS", attached, rows, route=["a", "b"])
    refused("HK-SHAPE", attached, rows, route=["a", "c"])
    refused("HK-SHAPE", attached.set_mix, "c")
    assert torch.equal(attached(rows).logits, want)
    assert list(attached.adapters) == ["a"]


def test_a_swap_is_whole_or_nothing(attached: Attached) -> None:
    one, two = make(attached, 1), make(attached, 2, rank=5, alpha=3, targets=["q_proj", "down_proj"])
    rows = ids(2, 5)
    attached.add("a", one)
    attached.add("b", make(attached, 3))
    attached.set_mix("a")
    want, then = attached(rows).logits, own(attached, two, rows)
    attached(rows, route=["a", "b"])
    attached.swap("a", two)
    assert torch.equal(attached(rows).logits, then)
    near = (attached(rows[:1], route=["a"]).logits - then[:1]).abs().max()
    assert near <= 1e-5
    assert (attached(rows, route=["a", "b"]).logits[0] - then[0]).abs().max() <= 1e-5 * then.abs().max()
    refused("HK-SHAPE", attached.swap, "a", make(Attached(model_of("llama", hidden_size=64)), 1))
    refused("HK-UNKNOWN-ADAPTER", attached.swap, "x", one)
    assert torch.equal(attached(rows).logits, then), "after a failed swap the old one still answers"
    attached.swap("a", one)
    assert torch.equal(attached(rows).logits, want)
    assert len(list(attached.parts)) == 2


def test_a_swap_that_the_mix_cannot_hold(attached: Attached) -> None:
    prefix = host().load("prefix")
    tokens = Adapter.fresh("p", prefix, parse_config(prefix.info.config, {}, "test"), attached.sites, 0)
    attached.add("a", make(attached, 1))
    attached.set_mix(Sum({"a": 0.5}))
    rows = ids(2, 5)
    want = attached(rows).logits
    refused("HK-MIX", attached.swap, "a", tokens)
    assert torch.equal(attached(rows).logits, want)


def test_a_running_call_ends_with_what_it_began_with(attached: Attached) -> None:
    """Swapped and removed between two layers, and between two tokens."""
    one, two = make(attached, 1), make(attached, 2)
    rows = ids(2, 5)
    attached.add("a", one)
    attached.set_mix("a")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want, answer = attached(rows).logits, attached.generate(rows, **options)
    turn = iter(range(10**6))
    layer: Any = attached.model.get_submodule("model.layers.1")
    handle = layer.register_forward_pre_hook(lambda *_: attached.swap("a", (two, one)[next(turn) % 2]))
    assert torch.equal(attached(rows).logits, want)
    attached.swap("a", one)
    turn = iter(range(10**6))
    assert torch.equal(attached.generate(rows, **options), answer)
    handle.remove()
    attached.swap("a", one)
    with attached.using("a"):
        attached.set_mix(None)
        attached.remove("a")
        assert torch.equal(attached(rows).logits, want)
    refused("HK-UNKNOWN-ADAPTER", attached, rows, route=["a", None])


def test_swaps_and_calls_from_several_threads(attached: Attached) -> None:
    """Every answer is that of one of the two, whole."""
    one, two = make(attached, 1), make(attached, 2)
    rows = ids(2, 5)
    wants = [own(attached, adapter, rows) for adapter in (one, two)]
    attached.add("a", one)
    attached.set_mix("a")
    wrong: list[float] = []

    def call() -> None:
        with torch.no_grad():
            for _ in range(30):
                have = attached(rows, route=["a", "a"]).logits
                away = min(float((have - want).abs().max()) for want in wants)
                if away > 1e-5:
                    wrong.append(away)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(60):
        attached.swap("a", (two, one)[number % 2])
    for thread in threads:
        thread.join()
    assert not wrong
