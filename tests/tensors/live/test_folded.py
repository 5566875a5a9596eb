"""A mix merged into a live model and taken out again: the bits of a merged checkpoint, and then those of the base."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from example_method import ia3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from variants import refused

from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import TOLERANCE, batch, randomize, tiny_model
from hubkit.tensors.base.delta import Delta
from hubkit.tensors.base.site import Site
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Stack, Sum
from hubkit.tensors.weights.merging import plan_merge

FIRST = {"llama": "q_proj", "gpt2": "c_attn"}
MEMBERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "low": ("lora", {"rank": 3}),
    "other": ("lora", {"rank": 2, "rslora": True}),
    "dora": ("dora", {"rank": 2}),
    "whole": ("full", {}),
    "bottleneck": ("adapters", {"width": 4}),
    "prefix": ("prefix", {"num_virtual_tokens": 3}),
}


def tied_in(gpt2: nn.Module) -> bool:
    """Whether its head is its table."""
    return gpt2.get_submodule("lm_head").weight is gpt2.get_submodule("transformer.wte").weight


def attached(family: str, *names: str, dtype: torch.dtype | None = None) -> Attached:
    """A tiny model with random adapters of `MEMBERS`."""
    made = Attached(tiny_model(family) if dtype is None else tiny_model(family).to(dtype))
    for seed, name in enumerate(names):
        put(made, name, *MEMBERS[name], seed=seed)
    return made


def put(made: Attached, name: str, method: str, values: Mapping[str, Any], seed: int = 0) -> None:
    loaded = host().load(method)
    config = parse_config(loaded.info.config, values, "x")
    made.add(name, randomize(Adapter.fresh(name, loaded, config, made.sites, seed), seed))


def state(made: Attached) -> dict[str, tuple[Tensor, int, int]]:
    """Every parameter of the model: its values, its object, its memory."""
    named = made.model.named_parameters(remove_duplicate=False)
    return {name: (p.detach().clone(), id(p), p.data_ptr()) for name, p in named}


def same(have: dict[str, tuple[Tensor, int, int]], want: dict[str, tuple[Tensor, int, int]]) -> bool:
    return have.keys() == want.keys() and all(
        torch.equal(have[n][0], want[n][0]) and have[n][1:] == want[n][1:] for n in want
    )


def near(have: Tensor, want: Tensor) -> bool:
    return bool((have - want).abs().max() <= TOLERANCE[want.dtype] * max(1.0, float(want.detach().abs().max())))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ten_times_in_half_precision(family: str) -> None:
    made = attached(family, "low", "dora", "whole", dtype=torch.bfloat16)
    before, want = state(made), made(batch()).logits
    made.set_mix(Stack([("low", 0.7), "dora", ("whole", -0.5)]))
    live = made(batch()).logits
    for _ in range(10):
        made.merge()
        assert not torch.equal(made(batch()).logits, want)
        made.unmerge()
        assert same(state(made), before)
        assert torch.equal(made(batch()).logits, live)
    made.set_mix(None)
    assert torch.equal(made(batch()).logits, want)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_merged_is_what_a_checkpoint_gets(family: str) -> None:
    made = attached(family, "low", "dora", "whole")
    mix = Sum([(Stack(["low", "dora"]), 0.5), "whole"])
    made.set_mix(mix)
    live = made(batch()).logits
    plan = plan_merge(made.sites, mix, made.adapters)
    want = {site.name: (plan.weight(site), plan.bias(site)) for site in plan.sites}
    with made.merge() as model:
        assert model is made.model
        assert near(model(batch()).logits, live)
        assert torch.equal(made(batch()).logits, model(batch()).logits)
        for name, (weight, bias) in want.items():
            module = model.get_submodule(name)
            assert torch.equal(module.get_parameter("weight"), weight)
            assert bias is None or torch.equal(module.get_parameter("bias"), bias)
            assert not module.get_parameter("weight").requires_grad
    assert near(made(batch()).logits, live)


@pytest.mark.parametrize("targets", [("wte",), ("lm_head",), ("wte", "lm_head", "c_attn")])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_tied_head(method: str, targets: tuple[str, ...]) -> None:
    """The tie breaks where one side changes alone (not where the tensor itself does), and is there again afterwards."""
    made = Attached(tiny_model("gpt2"))
    put(made, "a", method, {"targets": targets})
    made.set_mix("a")
    before, live = state(made), made(batch()).logits
    with made.merge() as model:
        assert near(model(batch()).logits, live)
        assert tied_in(model) == (method == "full")
    assert same(state(made), before)
    assert tied_in(made.model)


def test_what_is_refused_while_merged() -> None:
    made = attached("llama", "low", "other")
    refused("HK-MIX", made.merge)
    made.set_mix("low")
    with made.using("other"):
        refused("HK-MIX", made.merge)
    before = state(made)
    made.unmerge()
    folded = made.merge()
    inside = state(made)
    for call in (
        made.merge,
        lambda: made.set_mix("other"),
        lambda: made.set_mix(None),
        lambda: made.using("other").__enter__(),
        lambda: put(made, "more", "lora", {}),
        lambda: put(made, "quantized", "qlora", {}),
    ):
        refused("HK-MERGED", call)
    refused("HK-IN-USE", made.remove, "low")
    assert same(state(made), inside)
    folded.undo()
    folded.undo()
    made.merge()
    folded.undo()
    assert made.folded is not None, "an old merge undoes itself alone"
    made.unmerge()
    assert same(state(made), before)


@pytest.mark.parametrize("name", ["bottleneck", "prefix"])
def test_a_member_without_a_weight_to_give(name: str) -> None:
    made = attached("llama", "low", name)
    made.set_mix(Sum(["low", name]))
    before, live = state(made), made(batch()).logits
    error = refused("HK-NOT-MERGEABLE", made.merge)
    assert error.have[0].startswith(f"{name}: ")
    assert same(state(made), before)
    assert torch.equal(made(batch()).logits, live)


def test_a_bias_that_has_no_place() -> None:
    made, method = Attached(tiny_model("llama")), ia3()

    class AddsBias:
        def __getattr__(self, name: str) -> Any:
            return getattr(method, name)

        def merge(self, site: Site, tensors: Mapping[str, Tensor], config: Any) -> Delta:
            return Delta.full(bias=torch.ones(site.shape[0]))

    adapter = Adapter.fresh("a", method, parse_config(method.info.config, {}, "x"), made.sites, 0)
    adapter.method = AddsBias()
    made.add("a", adapter)
    made.set_mix("a")
    before = state(made)
    assert "the base has none there" in refused("HK-NOT-MERGEABLE", made.merge).what
    assert same(state(made), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["qlora", "dora"])
def test_a_quantized_base(family: str, method: str) -> None:
    """Inside, its layers multiply by their decoded weights with what is merged; afterwards by their 4 bits again."""
    made = Attached(tiny_model(family))
    put(made, "q", "qlora", {})
    put(made, "a", method, {}, seed=3)
    made.set_mix(Sum({"q": 1.0, "a": -0.5}) if method == "qlora" else "a")
    before, kept = made(batch()).logits, state(made)
    with made.merge():
        assert near(made(batch()).logits, before)
    assert torch.equal(made(batch()).logits, before)
    assert same(state(made), kept)
    made.set_mix(None)
    assert bool(((made(batch()).logits - before).abs() > 1e-3).any())


def rearranged(model: Any) -> int:
    """How many layers bitsandbytes has rearranged for its CPU kernel; it does so itself where the processor has it."""
    functional = pytest.importorskip("bitsandbytes").functional
    layers = [module for module in model.modules() if hasattr(getattr(module, "weight", None), "quant_state")]
    for layer in layers:
        if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            layer.weight.data, layer.weight.quant_state = functional._convert_weight_packed_for_cpu(
                layer.weight.data, layer.weight.quant_state
            )
    return len(layers)


def test_layers_that_bitsandbytes_rearranges(tmp_path: Path) -> None:
    """Attached before the first forward they keep what they hold; afterwards nothing can be said of their weights."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes)).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    load = partial(AutoModelForCausalLM.from_pretrained, tmp_path, quantization_config=how, dtype=torch.float32)
    fresh, used = load().eval(), load().eval()
    made = Attached(fresh)
    put(made, "a", "lora", {"rank": 2})
    made.set_mix("a")
    ids = torch.arange(24).view(2, 12)
    site = made.sites.sites["model.layers.0.mlp.up_proj"]
    weight = site.weight()
    with made.merge(), torch.no_grad():
        before = made(ids).logits
    with torch.no_grad():
        made(ids)
    assert rearranged(fresh) == 7
    assert torch.equal(site.weight(), weight)
    with made.merge(), torch.no_grad():
        assert torch.equal(made(ids).logits, before)
    assert rearranged(used) == 7
    late = Attached(used)
    put(late, "a", "lora", {"rank": 2})
    late.set_mix("a")
    refused("HK-QUANT-STATE", late.merge)
    assert late.folded is None


def test_values_beyond_the_dtype() -> None:
    made = attached("llama", "low", dtype=torch.float16)
    before = state(made)
    made.set_mix(Sum({"low": 1e6}))
    refused("HK-NAN", made.merge)
    assert made.folded is None
    assert same(state(made), before)


def test_exceptions_restore_everything() -> None:
    made = attached("gpt2", "low", "whole")
    made.set_mix(Sum(["low", "whole"]))
    before = state(made)
    with pytest.raises(KeyError), made.merge():
        raise KeyError

    class Stops(Attached):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "folded" and value is not None:
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    made.__class__ = Stops
    with pytest.raises(KeyboardInterrupt):
        made.merge()
    assert same(state(made), before)


def test_detaching_unmerges() -> None:
    model = tiny_model("gpt2")
    want = model(batch()).logits
    made = Attached(model)
    put(made, "a", "lora", {"targets": ("wte", "c_attn")})
    made.set_mix("a")
    made.merge()
    assert made.detach() is model
    assert torch.equal(model(batch()).logits, want)
    assert [p.requires_grad for p in model.parameters()] == [True] * len(list(model.parameters()))


WEIGHT = st.sampled_from([-1.5, -0.5, 0.0, 0.25, 1.0])
TREES: st.SearchStrategy[Mix] = st.recursive(
    st.sampled_from(["low", "other", "dora", "whole"]),
    lambda inner: st.tuples(
        st.sampled_from([Sum, Stack]), st.lists(st.tuples(inner, WEIGHT), min_size=1, max_size=3)
    ).map(lambda pair: pair[0](pair[1])),
    max_leaves=5,
)
SHARED: list[Attached] = []


@given(TREES)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_any_tree_live_is_that_tree_merged(mix: Mix) -> None:
    if not SHARED:
        SHARED.append(attached("gpt2", "low", "other", "dora", "whole"))
    made = SHARED[0]
    made.set_mix(mix)
    live = made(batch()).logits
    with made.merge():
        assert near(made(batch()).logits, live)


ORDERS = [("low", "other", False), ("low", "whole", False), ("dora", "low", True), ("dora", "whole", True)]


@pytest.mark.parametrize(("a", "b", "matters"), [*ORDERS, ("bottleneck", "bottleneck-2", True)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_where_order_matters(family: str, a: str, b: str, matters: bool) -> None:
    """A stack's order matters where a member reads what those below it made: outputs or weights; a sum's never."""
    names = [name for name in (a, b) if name in MEMBERS]
    made = attached(family, *names)
    if b not in MEMBERS:
        put(made, b, *MEMBERS[a], seed=5)

    def run(mix: Mix) -> Tensor:
        made.set_mix(mix)
        out: Tensor = made(batch()).logits
        return out

    assert near(run(Sum([a, b])), run(Sum([b, a])))
    one, two = run(Stack([a, b])), run(Stack([b, a]))
    assert torch.allclose(one, two, atol=1e-3) != matters
    assert near(one, two) != matters
    assert near(run(Stack([a])), run(a))
    assert near(run(Stack([(Stack([a]), 1.0), b])), one)
    assert near(run(Sum([(Stack([a, b]), 1.0)])), one)


def test_merging_makes_a_forward_pass_free_of_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = attached("llama", "low")
    made.set_mix("low")

    def fail(*args: Any) -> nn.Module:
        raise AssertionError

    with made.merge():
        monkeypatch.setattr("hubkit.tensors.live.plan.add_low_rank", fail)
        made(batch())
