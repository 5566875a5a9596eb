"""Adapters on a live model: nothing of it changes, no call leaves a trace, every path equals the plain formula."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from example_method import ia3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import near

from hubkit.errors import HubkitError
from hubkit.methods.api import NotMergeable
from hubkit.methods.config import parse_config
from hubkit.methods.host import Method, host
from hubkit.methods.suite import batch, randomize, tiny_model
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Route, Stack, Sum
from hubkit.tensors.parts.part import LowRank

ALL = {"targets": "all-linear", "rank": 3}
IA3 = {"llama": {}, "gpt2": {"targets": ["c_attn"], "feedforward": ["mlp.c_proj"]}}


def make(attached: Attached, name: str, values: dict[str, Any], seed: int, method: Method | None = None) -> Adapter:
    method = method or host().load("lora")
    config = parse_config(method.info.config, values, "x")
    return randomize(Adapter.fresh(name, method, config, attached.sites, seed), seed)


@pytest.fixture
def attached() -> Attached:
    """A tiny Llama with adapters a and b; none active."""
    made = Attached(tiny_model("llama"))
    made.add("a", make(made, "a", ALL, 1))
    made.add("b", make(made, "b", {"targets": ["q_proj", "down_proj"], "rank": 2}, 2))
    return made


def logits(attached: Attached, mix: Mix | None) -> Tensor:
    attached.set_mix(mix)
    out: Tensor = attached(batch()).logits
    return out


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Low-rank parts by their plain formula, without shared products and in-place sums."""

    def slow(group: Any, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        for part, weight in group.sites[name].parts:
            y = y + weight * part(x, y, None).to(y.dtype)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hubkit.tensors.live.plan.add_low_rank", slow)
        yield


def test_detaching_gives_the_model_back_as_it_was() -> None:
    model = tiny_model("llama")
    model.get_parameter("lm_head.weight").requires_grad_(False)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    want = model(batch()).logits
    attached = Attached(model)
    attached.add("a", make(attached, "a", ALL, 1))
    assert not torch.equal(logits(attached, "a"), want)
    assert not any(p.requires_grad for p in model.parameters())
    assert attached.detach() is model
    assert torch.equal(model(batch()).logits, want)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in after.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(HubkitError, match="HK-UNKNOWN-ADAPTER"):
        attached.set_mix("a")


def test_an_adapter_follows_the_models_mode() -> None:
    """An adapter trained with dropout answers without it."""
    attached = Attached(tiny_model("llama"))
    attached.add("a", make(attached, "a", ALL | {"dropout": 0.5}, 1))
    assert torch.equal(logits(attached, "a"), logits(attached, "a"))
    attached.train()
    assert not torch.equal(logits(attached, "a"), logits(attached, "a"))
    attached.add("b", make(attached, "b", ALL | {"dropout": 0.5}, 2))
    assert not torch.equal(logits(attached, "b"), logits(attached, "b"))


def test_adapters_come_and_go(attached: Attached) -> None:
    want = logits(attached, "b")
    attached.remove("a")
    attached.add("c", make(attached, "c", ALL, 3))
    held = {id(p) for p in attached.parts.parameters()}
    for name in ("b", "c"):
        assert all(id(p) in held for p in attached.adapters[name].parameters().values()), name
    assert torch.equal(logits(attached, "b"), want)
    with pytest.raises(HubkitError, match="HK-IN-USE"):
        attached.remove("b")
    attached.set_mix(None)
    for name in ("b", "c"):
        attached.remove(name)
    assert not list(attached.parts.parameters())
    attached.detach()
    assert not any(m._forward_hooks for m in attached.model.modules())


def test_what_does_not_belong_is_refused(attached: Attached) -> None:
    with pytest.raises(HubkitError, match="HK-NAME-TAKEN"):
        attached.add("a", make(attached, "x", ALL, 1))
    other = Attached(tiny_model("gpt2"))
    with pytest.raises(HubkitError, match="HK-SHAPE"):
        attached.add("x", make(other, "x", ALL, 1))
    assert list(attached.adapters) == ["a", "b"]


@pytest.mark.parametrize("how", ["whole", "in place", "a module"])
def test_a_compiled_model_is_refused(how: str) -> None:
    model: Any = tiny_model("llama")
    if how == "whole":
        model = torch.compile(model)
    elif how == "in place":
        model.compile()
    else:
        model.model.layers[1] = torch.compile(model.model.layers[1])
    with pytest.raises(HubkitError, match="HK-COMPILED"):
        Attached(model)


def test_an_exception_inside_leaves_the_next_call_clean(attached: Attached) -> None:
    want = logits(attached, Sum({"a": 1.0, "b": 0.5}))
    module = attached.model.get_submodule("model.layers.0.self_attn.k_proj")

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(fails)  # q_proj has run by then, and shares its input
    with pytest.raises(KeyboardInterrupt):
        attached(batch())
    handle.remove()
    assert torch.equal(attached(batch()).logits, want)
    with pytest.raises(ZeroDivisionError), attached.using("b"):
        raise ZeroDivisionError
    assert torch.equal(attached(batch()).logits, want)


def test_a_refused_mix_changes_nothing(attached: Attached) -> None:
    want = logits(attached, "a")
    for wrong in ("x", Sum(["a", Stack(["x"])])):
        with pytest.raises(HubkitError, match="HK-UNKNOWN-ADAPTER"):
            attached.set_mix(wrong)
        with pytest.raises(HubkitError, match="HK-UNKNOWN-ADAPTER"), attached.using(wrong):
            pass
    assert attached.mix == "a"
    assert torch.equal(attached(batch()).logits, want)


def test_what_reads_the_weight_cannot_stand_above_what_has_none_to_give(attached: Attached) -> None:
    method = ia3()
    attached.add("l", make(attached, "l", {}, 3, method))

    class Unmergeable:
        def __getattr__(self, name: str) -> Any:
            return getattr(host().load("lora"), name)

        def merge(self, *_: Any) -> Any:
            raise NotMergeable("it depends on the input")

    attached.adapters["b"].method = Unmergeable()
    attached.set_mix(Sum(["b", "l"]))
    attached.set_mix(Stack(["l", "b"]))
    with pytest.raises(HubkitError, match="it depends on the input"):
        attached.set_mix(Stack(["b", "l"]))
    assert attached.mix == Stack(["l", "b"])


def test_threads_keep_their_own_mix(attached: Attached) -> None:
    want = {name: logits(attached, name) for name in ("a", "b")}
    attached.set_mix(None)
    base = attached(batch()).logits
    barrier = threading.Barrier(2)
    wrong: list[str] = []

    def work(name: str) -> None:
        with torch.no_grad(), attached.using(name):
            barrier.wait()
            wrong.extend(name for _ in range(5) if not torch.equal(attached(batch()).logits, want[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(attached(batch()).logits, base)


def gradients(attached: Attached, call: Any) -> list[Tensor]:
    attached.zero_grad()
    call().float().square().mean().backward()
    return [p.grad.clone() for p in attached.parts.parameters() if p.grad is not None]


def sites_with_one_input(dtype: torch.dtype, mix: Mix, stored: torch.dtype) -> tuple[Attached, Any]:
    """A model of `dtype` with values of `stored`; a call of sites that share their input, and of one behind others."""
    attached = Attached(tiny_model("llama").to(stored).to(dtype))
    attached.add("a", make(attached, "a", ALL, 1))
    attached.add("b", make(attached, "b", {"targets": ["q_proj", "down_proj"], "rank": 2}, 2))
    attached.set_mix(mix)
    layer: Any = attached.model.get_submodule("model.layers.0")
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)).to(stored).to(dtype)
    attention = layer.self_attn
    called = (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp)
    return attached, lambda: torch.cat([module(x) for module in called], -1)


def far(have: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, each relative to the largest value there."""
    return max(float((h - w).detach().abs().max() / w.detach().abs().max()) for h, w in zip(have, want, strict=True))


MIXES = ["a", Sum({"a": 1.0, "b": -0.5}), Stack(["b", "a"])]


@pytest.mark.parametrize("mix", MIXES)
def test_the_fast_path_is_the_plain_formula(mix: Mix) -> None:
    """Values and gradients, in fp64."""
    attached, call = sites_with_one_input(torch.float64, mix, torch.float64)
    fast = [call(), *gradients(attached, call)]
    with plain():
        attached.set_mix(mix)
        slow = [call(), *gradients(attached, call)]
    assert len(slow) > 10
    assert far(fast, slow) <= 1e-12


@pytest.mark.parametrize("mix", MIXES)
def test_in_bf16_the_fast_path_is_as_near_to_the_truth_as_the_plain_formula(mix: Mix) -> None:
    attached, call = sites_with_one_input(torch.float32, mix, torch.bfloat16)
    truth = [call(), *gradients(attached, call)]
    attached, call = sites_with_one_input(torch.bfloat16, mix, torch.bfloat16)
    fast = [call(), *gradients(attached, call)]
    with plain():
        attached.set_mix(mix)
        slow = [call(), *gradients(attached, call)]
    assert call().dtype == torch.bfloat16
    assert far(fast, truth) <= 1.5 * far(slow, truth) < 0.2


def test_frozen_and_trainable_parts_side_by_side(attached: Attached) -> None:
    for parameter in attached.adapters["b"].parameters().values():
        parameter.requires_grad_(False)
    attached.set_mix(Sum({"a": 1.0, "b": 2.0}))
    fast = gradients(attached, lambda: attached(batch()).logits)
    with plain():
        attached.set_mix(attached.mix)
        slow = gradients(attached, lambda: attached(batch()).logits)
    assert len(fast) == len(attached.adapters["a"].parameters())
    assert all(torch.allclose(f, s, rtol=1e-4, atol=1e-7) for f, s in zip(fast, slow, strict=True))


def test_a_frozen_part_changed_in_place_is_not_answered_from_memory(attached: Attached) -> None:
    for parameter in attached.parts.parameters():
        parameter.requires_grad_(False)
    first = logits(attached, "a")
    with torch.no_grad():
        attached.adapters["a"].parts["model.layers.0.self_attn.q_proj"].get_parameter("B").mul_(3)
    with plain():
        want = logits(attached, "a")
    attached.set_mix("a")
    assert torch.allclose(attached(batch()).logits, want, atol=1e-5)
    assert not torch.allclose(first, want, atol=1e-5)


@pytest.mark.parametrize("where", ["module", "global"])
def test_who_keeps_an_output_keeps_its_values(attached: Attached, where: str) -> None:
    """Other hooks see the module's own output; it is not overwritten under their hands."""
    attached.set_mix(None)
    module = attached.model.get_submodule("model.layers.0.self_attn.q_proj")
    kept: list[Tensor] = []

    def keep(at: nn.Module, args: Any, y: Tensor) -> None:
        if at is module:
            kept.append(y)

    if where == "module":
        handle = module.register_forward_hook(keep, prepend=True)
    else:
        handle = nn.modules.module.register_module_forward_hook(keep)
    with torch.no_grad():
        attached(batch())
        attached.set_mix("a")
        have = attached(batch()).logits
    handle.remove()
    assert torch.equal(kept[0], kept[1])
    assert torch.allclose(have, logits(attached, "a"), atol=1e-6)


class Sharing(nn.Linear):
    """A linear whose output shares memory with something it keeps."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept[..., :]


@pytest.mark.parametrize("own", ["subclass", "patched"])
def test_an_output_that_is_held_is_not_written_to(own: str) -> None:
    model: Any = tiny_model("llama")
    old = model.model.layers[0].self_attn.q_proj
    new: Any = Sharing(16, 16, bias=False)
    if own == "patched":
        new = nn.Linear(16, 16, bias=False)

        def forward(x: Tensor) -> Tensor:
            new.kept = out = nn.functional.linear(x, new.weight)
            return out

        new.forward = forward
    new.load_state_dict(old.state_dict())
    model.model.layers[0].self_attn.q_proj = new
    attached = Attached(model)
    attached.add("a", make(attached, "a", ALL, 1))
    with torch.no_grad():
        attached(batch())
        want = new.kept.clone()
        attached.set_mix("a")
        attached(batch())
    assert torch.equal(new.kept, want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mix", ["a", Stack(["a", "l"]), Route([None, "a", "l"])])
def test_checkpointing_gives_the_same_gradients(mix: Mix, when: str, reentrant: bool) -> None:
    """Whoever switches it on, when and how; another mix is set before the backward pass."""
    model: Any = tiny_model("llama").double()
    model.train()
    if when == "before":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    attached = Attached(model)
    attached.add("a", make(attached, "a", ALL, 1))
    attached.add("l", make(attached, "l", {}, 2, ia3()))
    if when == "after":
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def call() -> Tensor:
        attached.set_mix(None)
        with attached.using(mix):
            out: Tensor = attached(batch()).logits
        attached.set_mix("l")
        return out

    have = gradients(attached, call)
    model.gradient_checkpointing_disable()
    want = gradients(attached, call)
    assert len(have) == len(want) > 0
    for one, other in zip(have, want, strict=True):  # gradients that meet in one tensor are added in another order
        near(one, other)
    attached.detach()
    assert all(type(m.__dict__.get("_gradient_checkpointing_func")).__name__ != "UnderItsMix" for m in model.modules())


def test_the_recomputation_runs_under_the_mix_of_its_forward(attached: Attached) -> None:
    attached.set_mix("a")
    layer = attached.model.get_submodule("model.layers.0.mlp")
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    want = gradients(attached, lambda: layer(x))

    def call() -> Tensor:
        out: Tensor = checkpoint(layer, x, use_reentrant=False, context_fn=attached.checkpoint_contexts)
        attached.set_mix("b")  # before the backward pass
        return out

    have = gradients(attached, call)
    assert all(torch.equal(h, w) for h, w in zip(have, want, strict=True))
    assert attached.mix == "b"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_flow_through_the_weight_that_the_upper_member_reads(family: str) -> None:
    """In a stack, a member that multiplies the weight below it: against autograd of the written-out product."""
    attached = Attached(tiny_model(family))
    name = "model.layers.1.mlp.down_proj" if family == "llama" else "transformer.h.1.mlp.c_proj"
    attached.add("a", make(attached, "a", {"targets": [name], "rank": 2}, 1))
    attached.add("l", make(attached, "l", IA3[family], 2, ia3()))
    attached.set_mix(Stack([("a", 0.5), "l"]))
    site = attached.sites.sites[name]
    low, scale = attached.adapters["a"].parts[name], attached.adapters["l"].parts[name].get_parameter("l")
    assert isinstance(low, LowRank)
    assert site.module is not None
    x = torch.randn(3, site.shape[1], dtype=site.dtype, generator=torch.Generator().manual_seed(0))
    below = site.weight() + 0.5 * low.scale * low.B @ low.A
    want = torch.autograd.grad(
        nn.functional.linear(x, below * scale, site.bias()).square().sum(), [low.A, low.B, scale]
    )
    have = torch.autograd.grad(site.module(x).square().sum(), [low.A, low.B, scale])
    for h, w in zip(have, want, strict=True):
        assert (h - w).abs().max() <= (1e-10 if family == "gpt2" else 1e-5) * w.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_order_matters_where_members_meet_and_nowhere_else(family: str) -> None:
    attached = Attached(tiny_model(family))
    inner = ["down_proj", "k_proj"] if family == "llama" else ["c_attn", "mlp.c_proj"]
    apart = ["q_proj", "up_proj"] if family == "llama" else ["c_fc"]
    attached.add("l", make(attached, "l", IA3[family], 3, ia3()))
    attached.add("meets", make(attached, "meets", {"targets": inner, "rank": 2}, 1))
    attached.add("apart", make(attached, "apart", {"targets": apart, "rank": 2}, 2))

    def apart_by(one: Mix, two: Mix) -> float:
        return float((logits(attached, one) - logits(attached, two)).detach().abs().max())

    exact = 1e-5 if family == "llama" else 1e-12
    assert apart_by(Stack(["meets", "l"]), Stack(["l", "meets"])) > 1e-3
    assert apart_by(Stack(["apart", "l"]), Stack(["l", "apart"])) <= exact
    assert apart_by(Stack(["apart", "l"]), Sum(["l", "apart"])) <= exact
    assert apart_by(Stack(["l", "meets"]), Sum(["l", "meets"])) <= exact, (
        "a low-rank part reads neither output nor weight"
    )
    assert apart_by(Sum(["meets", "l"]), Sum(["l", "meets"])) <= exact
