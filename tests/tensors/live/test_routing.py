"""Rows of one batch under different mixes: row i is what its mix gives alone, in every method and every pass."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import refused
from zoo import N, ids, model_of, near

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import randomize
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.lowrank import rows as lowrank_rows
from hubkit.tensors.lowrank.kernel import row_kernel
from hubkit.tensors.native import SWITCH
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Route, Stack, Sum, by_row, leaves, names, to_document

CC = shutil.which("cc") or shutil.which("gcc")
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "a": ("lora", {"targets": "all-linear", "rank": 3}),
    "b": ("lora", {"targets": "all-linear", "rank": 5, "rslora": True}),
    "few": ("lora", {"targets": ["q_proj", "down_proj"], "layers": [1], "rank": 2}),
    "table": ("lora", {"targets": ["model.embed_tokens"], "rank": 2}),
    "dora": ("dora", {"targets": "all-linear", "rank": 2}),
    "neck": ("adapters", {"width": 4}),
    "prefix": ("prefix", {"num_virtual_tokens": N}),
    "short": ("prefix", {"num_virtual_tokens": 2}),
    "prompt": ("prompt", {"num_virtual_tokens": 3}),
    "norms": ("selective", {"biases": [], "weights": ["input_layernorm"]}),
}
GPT2: dict[str, dict[str, Any]] = {
    "few": {"targets": ["c_attn"]},
    "table": {"targets": ["wte"]},
    "norms": {"weights": ["ln_1"]},
}
ROUTES: dict[str, list[Mix | None]] = {
    "low-rank": ["a", "b", None, "few", Sum({"a": 0.5, "b": -1.0}), Stack(["b", "few"])],
    "edits": ["a", "dora", None, "neck", "norms", Stack([("dora", 0.5), "a"]), "table"],
    "virtual": ["prefix", None, "prompt", "short", Sum(["prompt", "prefix"]), "prefix"],
    "all": ["neck", "prompt", Sum(["prompt", "a"]), None, Sum([(Stack(["a", "dora"]), -1.0), "prefix"]), "b", "table"],
    "alike": ["prefix", "prefix", "prefix"],
    "bases": [None, None],
}


def attached_zoo(kind: str = "llama", attention: str = "sdpa", only: Iterable[str] = ZOO, **sizes: Any) -> Attached:
    """A tiny model in fp64 with the named adapters: in fp32 two orders of one sum differ as much as a fault would.

    Eager attention is left in fp32: transformers takes its softmax there, where the mask's fp64 minimum is infinite.
    """
    attached = Attached(model_of(kind, attention, **sizes).to(torch.float32 if attention == "eager" else torch.float64))
    for seed, name in enumerate(only):
        method, values = ZOO[name]
        values = {**values, **(GPT2.get(name, {}) if kind == "gpt2" else {})}
        loaded = host().load(method)
        config = parse_config(loaded.info.config, values, "test")
        adapter = randomize(Adapter.fresh(name, loaded, config, attached.sites, seed), seed)
        attached.add(name, adapter)
    return attached.eval()


def members(route: list[Mix | None]) -> list[str]:
    return names(Route(route))


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize(
    ("kind", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("qwen3", "sdpa")]
)
def test_each_row_is_its_own_run(kind: str, attention: str, route: list[Mix | None]) -> None:
    attached = attached_zoo(kind, attention, members(route))
    rows = ids(len(route), 7)
    mask = torch.ones_like(rows)
    mask[0, :3] = mask[-1, :2] = 0
    for given in (None, mask):
        have = attached(input_ids=rows, attention_mask=given, route=route).logits
        for index, mix in enumerate(route):
            own = None if given is None else given[index : index + 1]
            with attached.using(mix):
                want = attached(input_ids=rows[index : index + 1], attention_mask=own).logits[0]
            seen = slice(None) if given is None else given[index].bool()
            near(have[index][seen], want[seen])
    near(attached(rows).logits, attached.detach()(rows).logits)


@pytest.mark.parametrize("route", [ROUTES["all"], ROUTES["low-rank"]], ids=["all", "low-rank"])
@pytest.mark.parametrize("how", ["plain", "checkpointed", "reentrant"])
def test_the_gradients_are_those_of_each_rows_own_run(route: list[Mix | None], how: str) -> None:
    attached = attached_zoo(only=members(route)).train()
    if how != "plain":
        attached.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    rows = ids(len(route), 6)

    def gradients() -> dict[str, Tensor]:
        found = {f"{n}.{k}": p for n, a in attached.adapters.items() for k, p in a.parameters().items()}
        made = {key: p.grad.clone() for key, p in found.items() if p.grad is not None}
        attached.zero_grad()
        return made

    def loss(mix: Any, batch: Tensor) -> Tensor:
        total: Tensor = attached(input_ids=batch, route=mix).logits.square().sum()
        return total

    loss(route, rows).backward()  # type: ignore[no-untyped-call]
    have = gradients()
    for index, mix in enumerate(route):
        if mix is not None:
            loss([mix], rows[index : index + 1]).backward()  # type: ignore[no-untyped-call]
    want = gradients()
    assert set(have) == set(want)
    for name in want:
        near(have[name], want[name])


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"use_cache": False},
        {"do_sample": True, "top_k": 1},
        {"num_beams": 4, "num_return_sequences": 2},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "beams", "uncached", "sampling", "answers", "static"],
)
@pytest.mark.parametrize(
    ("kind", "route"), [("llama", "all"), ("llama", "virtual"), ("gpt2", "all"), ("gemma3_text", "all")]
)
def test_generate_follows_the_route(kind: str, route: str, how: dict[str, Any]) -> None:
    chosen = ROUTES[route]
    attached = attached_zoo(kind, only=members(chosen))
    rows = ids(len(chosen), 6, 3)
    mask = torch.ones_like(rows)
    mask[1, :2] = mask[2, :4] = 0
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **how}
    have = attached.generate(input_ids=rows, attention_mask=mask, route=chosen, **options)
    each = len(have) // len(chosen)
    for index, mix in enumerate(chosen):
        with attached.using(mix):
            want = attached.generate(
                input_ids=rows[index : index + 1], attention_mask=mask[index : index + 1], **options
            )
        assert torch.equal(have[index * each : (index + 1) * each], want), mix


@pytest.mark.parametrize("compiled", ["1", "0"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_half_precision_rows_in_a_step_of_decoding(kind: str, compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows take a way of their own, with and without compiled code: bf16's own rounding away from the exact one.

    One adapter acts at some sites only; one row has none; three tokens of each row are still few.
    """
    monkeypatch.setenv(SWITCH, compiled)
    monkeypatch.setattr(lowrank_rows, "row_kernel", row_kernel.__wrapped__)  # else asked once in a process
    attached = attached_zoo(kind, only=("a", "b", "few"), initializer_range=0.1)
    for parameter in attached.parts.parameters():
        parameter.requires_grad_(False).mul_(0.3)
    route: list[Mix | None] = ["a", None, "few", "b", Sum({"a": 0.5, "b": 2.0}), "few"]
    attached.set_mix(Route(route))
    for tokens in (1, 3):
        rows = ids(6, tokens)
        with torch.no_grad():
            want = attached.to(torch.bfloat16).double()(rows).logits  # of the weights that bf16 holds
            attached.to(torch.bfloat16)
            have = attached(rows).logits.double()
            alone = attached(rows[:1].expand(6, -1), route=["a"] * 6).logits[0].double()
            acting = attached._active().rows
            assert acting is not None
            assert (acting.kernel is not None) == (compiled == "1" and CC is not None)
        assert (have - want).abs().max() <= 2**-5 * want.abs().max()
        assert (have[0] - alone).abs().max() <= 2**-5 * want.abs().max()


def test_a_route_inside_a_mix_and_a_mix_inside_a_route() -> None:
    tree = Sum([("a", 0.5), (Route(["b", None, Sum({"few": 2.0})]), -1.0)])
    assert by_row(tree) == (
        Sum([("a", 0.5), ("b", -1.0)]),
        Sum([("a", 0.5)]),
        Sum([("a", 0.5), (Sum({"few": 2.0}), -1.0)]),
    )
    assert by_row(Stack([Route([None, "a"])])) == (None, Stack(["a"]))
    assert by_row(Sum(["a"])) is None
    assert list(leaves(Route(["a", None, Sum({"b": 2.0})]), 3.0)) == [("a", 3.0), ("b", 6.0)]
    assert to_document(Route(["a", None])) == {"route": [{"adapter": "a"}, None]}
    attached = attached_zoo(only=("a", "b", "few"))
    rows = ids(3, 5)
    with attached.using(tree):
        have = attached(rows).logits
    near(have, attached(rows, route=by_row(tree)).logits)


def test_wrong_routes() -> None:
    attached = attached_zoo(only=("a", "b"))
    rows = ids(2, 5)
    attached.set_mix("a")
    want = attached(rows).logits
    for other in (["a"], ["a", "b", "a"], ["a"] * 4):
        error = refused("HK-ROUTE", attached, rows, route=other)
        assert (error.want, error.have) == (["2 entries, one per row"], [str(len(other))])
        refused("HK-ROUTE", attached.generate, rows, route=other, max_new_tokens=1)
    error = refused("HK-UNKNOWN-ADAPTER", attached, rows, route=["a", "c"])
    assert "a, b" in str(error.want)
    refused("HK-ROUTE", attached, rows, route=[])
    refused("HK-ROUTE", attached, rows, route=[1, 2])
    for wrong in ("a", 3, [{"a": 1.0}, None]):
        refused("HK-ROUTE", attached, rows, route=wrong)
    for no_mix in (3, ["a"], {"a": 1.0}):
        refused("HK-MIX", attached.set_mix, no_mix)
        refused("HK-MIX", Sum, [no_mix])
    refused("HK-MIX", Sum, {"a": "x"})
    refused("HK-MIX", Sum, [("a", 1, 2)])
    refused("HK-OPTIONS", attached.compiled, 0)
    refused("HK-OPTIONS", setattr, attached, "memory", 0)
    refused("HK-ROUTE", attached.set_mix, Sum([Route(["a"]), Route(["a", "b"])]))
    with attached.using(Route(["a", None])):
        refused("HK-ROUTE", attached.model, ids(4, 5))
    assert torch.equal(attached(rows).logits, want)
    assert attached.mix == "a"


def test_an_exception_inside_a_routed_forward_leaves_the_next_call_clean() -> None:
    attached = attached_zoo(only=("a", "prompt"))
    rows, route = ids(2, 5), ["prompt", "a"]
    want, base = attached(rows, route=route).logits, attached(rows).logits
    layer: Any = attached.model.get_submodule("model.layers.1.mlp")

    def fail(*args: Any) -> None:
        raise KeyError("broken")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        attached(rows, route=route)
    handle.remove()
    assert torch.equal(attached(rows).logits, base)
    assert torch.equal(attached(rows, route=route).logits, want)


def test_parts_that_see_no_rows_cannot_be_routed() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "vocab_size": 48}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    attached = Attached(t5.eval().double())
    method = host().load("lora")
    for name, targets in (("bias", ["relative_attention_bias"]), ("q", ["q"])):
        config = parse_config(method.info.config, {"targets": targets, "rank": 2}, "test")
        attached.add(name, randomize(Adapter.fresh(name, method, config, attached.sites, 0), 1))
    rows = ids(3, 5)
    error = refused("HK-ROUTE", attached, rows, route=["bias", "q", None], decoder_input_ids=rows)
    assert "relative_attention_bias" in str(error.have)
    have = attached(rows, route=["q", None, "q"], decoder_input_ids=rows).logits
    for index, mix in enumerate(["q", None, "q"]):
        with attached.using(mix):
            near(have[index], attached(rows[index : index + 1], decoder_input_ids=rows[index : index + 1]).logits[0])
    beams = attached.generate(rows, route=["q", None, "q"], num_beams=2, max_new_tokens=4, eos_token_id=None)
    with attached.using("q"):
        assert torch.equal(beams[2:], attached.generate(rows[2:], num_beams=2, max_new_tokens=4, eos_token_id=None))


def test_threads_with_routes_of_their_own_do_not_meet() -> None:
    attached = attached_zoo(only=("a", "b", "prefix", "prompt", "neck"))
    rows = ids(2, 6)
    routes: list[list[Mix | None]] = [["a", "prefix"], ["b", None], ["prompt", "neck"], [None, "a"]]
    with torch.no_grad():
        want = [attached(rows, route=route).logits for route in routes]
        wrong: list[int] = []

        def answer(number: int) -> None:
            with torch.no_grad():
                for _ in range(8):
                    if not torch.allclose(attached(rows, route=routes[number]).logits, want[number], atol=1e-6):
                        wrong.append(number)

        threads = [threading.Thread(target=answer, args=(n,)) for n in range(len(routes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_changed_factor_is_seen_by_the_next_call() -> None:
    attached = attached_zoo(only=("a", "b"))
    for parameter in attached.parts.parameters():
        parameter.requires_grad_(False)
    rows, route = ids(2, 5), ["a", "b"]
    with torch.no_grad():
        attached(rows, route=route)
        attached(rows, route=route)
        for parameter in attached.adapters["a"].parameters().values():
            parameter.mul_(2)
        have = attached(rows, route=route).logits
        with attached.using("a"):
            near(have[0], attached(rows[:1]).logits[0])
