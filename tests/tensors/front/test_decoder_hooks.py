"""Virtual tokens: what the base makes of a text, put in front as such, is that text in front. The base judges."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from variants import refused
from zoo import N, ids, model_of, near

from hubkit.artifact.identity.config_identity import config_values
from hubkit.artifact.identity.header import TensorInfo
from hubkit.methods.config import parse_config
from hubkit.methods.host import host
from hubkit.methods.suite import randomize, tiny_model
from hubkit.tensors.base.arch import arch_of, decoders
from hubkit.tensors.base.base import Base
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Stack, Sum


def fresh(method: str, base: Base, seed: int = 0, **config: Any) -> Adapter:
    loaded = host().load(method)
    values = {"num_virtual_tokens": N, **config} if method != "lora" else config
    return Adapter.fresh(method, loaded, parse_config(loaded.info.config, values, "test"), base, seed)


def holding(method: str, attached: Attached, text: Tensor) -> Adapter:
    """A prefix or prompt that holds `text`, (n,)."""
    adapter = fresh(method, attached.sites, num_virtual_tokens=len(text))
    (value,) = adapter.parameters().values()
    with torch.no_grad():
        if method == "prefix":
            kv = attached.sites.keys_values(text)
            value.copy_(kv.permute(3, 0, 1, 2, 4).reshape(value.shape))
        else:
            value.copy_(attached.sites.embed(text))
    return adapter


def in_front(model: Any, text: Tensor, batch: Tensor, mask: Tensor | None = None) -> Tensor:
    """The base's logits of `batch` behind `text`, which is plain tokens of every row."""
    rows = torch.cat([text.expand(len(batch), -1), batch], 1)
    wide = None if mask is None else torch.cat([torch.ones(len(batch), len(text), dtype=mask.dtype), mask], 1)
    logits: Tensor = model(input_ids=rows, attention_mask=wide).logits[:, len(text) :]
    return logits


METHODS = ("prefix", "prompt")


EAGER = ("gemma2", "gpt_oss", "bloom", "mpt", "ctrl", "gptj", "codegen", "gpt_neo", "jetmoe", "xglm")
"""Whose attention is no plain one: caps, sinks, biases."""
CAUSAL = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
RELEASE = int(transformers.__version__.partition(".")[0])


def here(kind: str) -> bool:
    """Whether the installed transformers has this type, and an attention of it that takes virtual tokens."""
    return kind in CAUSAL and arch_of(kind).tokens_since <= RELEASE


CASES = [(kind, "sdpa") for kind in decoders() if kind not in EAGER and here(kind)]
CASES += [(kind, "eager") for kind in ("llama", "gpt2", "gemma3_text", *EAGER) if here(kind)]


NEWER = [kind for kind in decoders() if kind in CAUSAL and not here(kind)]


@pytest.mark.parametrize("kind", NEWER)
def test_an_older_transformers_is_refused_by_name(kind: str) -> None:
    attached = Attached(model_of(kind, "eager" if kind in EAGER else "sdpa"))
    error = refused("HK-ARCH", attached.add, "a", fresh("prompt", attached.sites, num_virtual_tokens=2))
    assert "transformers" in error.fix


@pytest.mark.parametrize(("kind", "attention"), CASES)
def test_a_text_in_front_is_that_text_in_front(kind: str, attention: str) -> None:
    model = model_of(kind, attention)
    text, batch = ids(1, N)[0], ids(3, 7, 1)
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    want, padded = in_front(model, text, batch), in_front(model, text, batch, mask)
    for method in METHODS if "kv" in Base.from_model(model).virtual else ("prompt",):
        attached = Attached(model)
        attached.add("a", holding(method, attached, text))
        attached.set_mix("a")
        near(attached(batch).logits, want)
        near(attached(batch, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
        cached = attached.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False)
        plain = attached.generate(batch, attention_mask=mask, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)
        attached.detach()


def attached_random(method: str, kind: str = "llama", attention: str = "sdpa", seed: int = 0) -> Attached:
    attached = Attached(model_of(kind, attention))
    attached.add("a", randomize(fresh(method, attached.sites, seed), seed))
    attached.set_mix("a")
    return attached


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_ways_to_generate(method: str, kind: str) -> None:
    """Greedy, beams, sampling: with a cache, without, with a static one, and rows as if they were alone."""
    model = model_of(kind)
    text, batch = ids(1, N)[0], ids(2, 6, 1)
    attached = Attached(model)
    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 8},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
    ]
    want = []
    for way in ways:
        torch.manual_seed(0)
        rows = torch.cat([text.expand(2, -1), batch], 1)
        want.append(model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=7, **way)[:, N:])
    attached.add("a", holding(method, attached, text))
    attached.set_mix("a")
    for way, rows in zip(ways, want, strict=True):
        torch.manual_seed(0)
        mask = torch.ones_like(batch)
        assert torch.equal(attached.generate(batch, attention_mask=mask, max_new_tokens=7, **way), rows), way
    long = torch.cat([torch.zeros(1, 3, dtype=torch.long), batch[:1]], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    alone = attached.generate(batch[:1], attention_mask=torch.ones(1, 6), max_new_tokens=7, do_sample=False)
    padded = attached.generate(long, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(padded[:, 3:], alone)


SEVERAL = ("llama", "gpt2", "gpt_neox", "bloom", "mpt", "opt", "gpt_neo", "ctrl", "llama4_text")


@pytest.mark.parametrize("kind", [kind for kind in SEVERAL if here(kind)])
@pytest.mark.parametrize("method", METHODS)
def test_a_text_read_in_several_goes(method: str, kind: str) -> None:
    attached = attached_random(method, kind, "eager" if kind in EAGER else "sdpa")
    batch = ids(2, 9)
    want = attached(batch).logits
    with torch.no_grad():
        first = attached(batch[:, :4], use_cache=True)
        assert first.past_key_values.get_seq_length() == 4, "the cache is the text's alone"
        then = attached(batch[:, 4:8], past_key_values=first.past_key_values, use_cache=True)
        last = attached(batch[:, 8:], past_key_values=then.past_key_values, use_cache=True)
    near(torch.cat([first.logits, then.logits, last.logits], 1), want)


@pytest.mark.parametrize(
    ("kind", "window"),
    [
        (kind, "sliding_window")
        for kind in ("mistral", "gemma3_text", "olmo3", "exaone4", "cohere2", "gpt_oss", "phi3", "starcoder2")
    ]
    + [("modernbert-decoder", "local_attention"), ("llama4_text", "attention_chunk_size")],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_sliding_window_does_not_slide_past_them(method: str, kind: str, window: str) -> None:
    """The text's window is its own; what is in front is always seen, whatever the cache keeps."""
    attached = Attached(model_of(kind, "eager" if kind in EAGER else "sdpa", **{window: 4}))
    attached.add("a", randomize(fresh(method, attached.sites), 0))
    attached.set_mix("a")
    batch = ids(2, 7)
    mask = torch.ones_like(batch)
    mask[0, :2] = 0
    how: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    want = attached.generate(batch, use_cache=False, **how)
    assert torch.equal(attached.generate(batch, **how), want)
    assert torch.equal(attached.generate(batch, cache_implementation="static", **how), want)


@pytest.mark.parametrize("method", METHODS)
def test_positions_and_embeddings_may_be_given(method: str) -> None:
    attached = attached_random(method)
    batch = ids(2, 6)
    want = attached(batch).logits
    near(attached(batch, position_ids=torch.arange(6)[None]).logits, want)
    near(attached(None, None, torch.arange(6)[None], inputs_embeds=attached.sites.embed(batch)).logits, want)


def loss_of(model: Any, batch: Tensor, **more: Any) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False, **more).loss
    return loss


def gradients(attached: Attached, batch: Tensor) -> dict[str, Tensor]:
    parameters = {f"{n}.{k}": p for n, a in attached.adapters.items() for k, p in a.parameters().items()}
    for parameter in parameters.values():
        parameter.grad = None
    loss_of(attached, batch).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("method", "kind"),
    [(m, "llama") for m in ("prefix", "projected", "prompt", "both")] + [("both", "gpt2"), ("both", "bloom")],
)
def test_checkpointing_gives_the_same_gradients(method: str, kind: str, reentrant: bool, when: str) -> None:
    def made() -> Attached:
        how = "eager" if kind in EAGER else "sdpa"
        attached = Attached(model_of(kind, how, **(NO_DROPOUT if kind == "gpt2" else {})))
        if when == "before" and checkpointed:
            attached.gradient_checkpointing_enable({"use_reentrant": reentrant})
        members = {"prefix": ("prefix",), "prompt": ("prompt",), "both": ("prompt", "prefix", "lora")}
        for member in members.get(method, ("prefix",)):
            config: dict[str, Any] = {"prefix_projection": True} if method == "projected" else {}
            attached.add(member, randomize(fresh(member, attached.sites, **config), 1))
        attached.set_mix(Sum(list(attached.adapters)))
        if when == "after" and checkpointed:
            attached.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return attached.train()

    batch = ids(2, 7)
    checkpointed = False
    want = gradients(made(), batch)
    checkpointed = True
    attached = made()
    have = gradients(attached, batch)
    assert set(have) == set(want)
    assert len(have) == len([p for a in attached.adapters.values() for p in a.parameters()])
    for name in want:
        near(have[name], want[name])
        assert want[name].abs().max() > 0
    again = gradients(attached, batch)
    assert all(torch.equal(again[name], have[name]) for name in have), "nothing is left over from a pass"


@pytest.mark.parametrize(("kind", "attention"), [c for c in CASES if c[0] in ("llama", "gpt2", "gemma2")])
def test_the_gradient_of_a_prompt_is_that_of_embeddings_in_front(kind: str, attention: str) -> None:
    model = model_of(kind, attention)
    attached = Attached(model)
    adapter = randomize(fresh("prompt", attached.sites), 0)
    (prompt,) = adapter.parameters().values()
    batch = ids(3, 6)
    labels = torch.cat([torch.full((3, N + 1), -100), batch[:, 1:]], 1)  # who is first is nobody's target
    free = prompt.detach().clone().requires_grad_()
    embeds = torch.cat([free.expand(3, -1, -1), attached.sites.embed(batch)], 1)
    want = model(inputs_embeds=embeds, labels=labels).loss
    want.backward()
    attached.add("a", adapter)
    attached.set_mix("a")
    loss = loss_of(attached, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert prompt.grad is not None
    assert free.grad is not None
    near(loss, want)
    near(prompt.grad, free.grad)


def test_two_forwards_before_one_backward() -> None:
    attached = attached_random("prompt")
    attached.train()
    attached.gradient_checkpointing_enable({"use_reentrant": True})
    (prompt,) = attached.adapters["a"].parameters().values()
    one, two = gradients(attached, ids(2, 6)), gradients(attached, ids(2, 8, 1))
    prompt.grad = None
    (loss_of(attached, ids(2, 6)) + loss_of(attached, ids(2, 8, 1))).backward()  # type: ignore[no-untyped-call]
    assert prompt.grad is not None
    near(prompt.grad, one["a.tokens.prompt"] + two["a.tokens.prompt"])


def test_a_mix_changed_before_the_backward() -> None:
    """The recomputation finds its own forward's tokens."""
    attached = attached_random("prefix")
    attached.add("b", randomize(fresh("prefix", attached.sites, 3), 3))
    attached.train()
    attached.gradient_checkpointing_enable({"use_reentrant": False})
    want = gradients(attached, ids(2, 6))
    (prefix,) = attached.adapters["a"].parameters().values()
    prefix.grad = None
    loss = loss_of(attached, ids(2, 6))
    attached.set_mix("b")
    loss.backward()  # type: ignore[no-untyped-call]
    assert prefix.grad is not None
    near(prefix.grad, want["a.kv.prefix"])


def test_several_are_concatenated_in_order() -> None:
    model = model_of("llama")
    one, two, batch = ids(1, 4)[0], ids(1, 3, 5)[0], ids(2, 6, 1)
    want = in_front(model, torch.cat([one, two]), batch)
    attached = Attached(model)
    attached.add("one", holding("prompt", attached, one))
    attached.add("two", holding("prompt", attached, two))
    attached.add("kv", holding("prefix", attached, one))
    attached.add("all", holding("prefix", attached, torch.cat([one, two])))
    for mix in (Sum(["one", "two"]), Stack(["one", "two"]), Sum(["kv", "two"]), "all"):
        attached.set_mix(mix)
        near(attached(batch).logits, want)
    attached.add("rows", randomize(fresh("prefix", attached.sites, 3), 3))
    attached.set_mix(Sum(["all", "rows"]))
    one_way = attached(batch).logits
    attached.set_mix(Sum(["rows", "all"]))
    near(attached(batch).logits, one_way)


def test_a_prompt_is_read_under_the_mix_it_is_in() -> None:
    model = model_of("llama")
    text, batch = ids(1, N)[0], ids(2, 6, 1)
    attached = Attached(model)
    attached.add("lora", randomize(fresh("lora", attached.sites, rank=2), 1))
    attached.set_mix("lora")
    want = in_front(attached, text, batch)
    attached.add("prompt", holding("prompt", attached, text))
    for mix in (Sum(["lora", "prompt"]), Stack(["prompt", "lora"])):
        attached.set_mix(mix)
        near(attached(batch).logits, want)
        cached = attached.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        for parameter in attached.adapters["lora"].parameters().values():
            parameter.mul_(1.5)
    attached.set_mix("lora")
    changed = in_front(attached, text, batch)
    attached.set_mix(Sum(["prompt", "lora"]))
    near(attached(batch).logits, changed)
    assert (changed - want).abs().max() > 0.01
    assert cached.shape == (2, 11)


@pytest.mark.parametrize("method", METHODS)
def test_a_change_is_seen_at_once(method: str) -> None:
    attached = attached_random(method)
    batch = ids(2, 6)
    with torch.no_grad():
        before = attached(batch).logits
        (value,) = attached.adapters["a"].parameters().values()
        value.mul_(1.5)
        after = attached(batch).logits
        assert not torch.equal(before, after)
        next(attached.model.parameters()).mul_(1.01)
        assert not torch.equal(attached(batch).logits, after)
    mask = torch.ones_like(batch)
    mask[0, :2] = 0
    with torch.inference_mode():
        inside = attached(batch).logits
        attached(batch, attention_mask=mask)
    value.requires_grad_(False)
    near(attached(batch).logits, inside)
    loss = loss_of(attached, batch)
    assert not loss.requires_grad


@pytest.mark.parametrize("method", ["prefix", "prompt", "lora"])
def test_a_step_of_a_fused_optimizer_is_seen_at_once(method: str) -> None:
    """It changes values and leaves their version counters as they were; what is kept must not outlive it."""
    attached = attached_random(method).eval()
    parameters = [*attached.adapters["a"].parameters().values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    with torch.no_grad():
        before = attached(ids(2, 5)).logits
    torch.autograd.backward(loss_of(attached, ids(2, 5)))
    optimizer.step()
    with torch.no_grad():
        after = attached(ids(2, 5)).logits
    assert not torch.allclose(before, after, atol=1e-3)
    for parameter in parameters:
        parameter.requires_grad_(False)
    with torch.no_grad():
        near(attached(ids(2, 5)).logits, after)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_keys_and_values_of_a_text_are_the_bases_own(kind: str) -> None:
    attached = attached_random("prefix", kind)
    want = Base.from_model(model_of(kind)).keys_values(ids(1, 6)[0])
    attached.add("lora", randomize(fresh("lora", attached.sites, rank=2), 1))
    attached.set_mix(Sum(["lora", "a"]))
    near(attached.train().sites.keys_values(ids(1, 6)[0]), want)
    assert attached.model.training


def test_threads_have_their_own_mix() -> None:
    attached = attached_random("prefix")
    attached.add("b", randomize(fresh("prompt", attached.sites, 3), 3))
    batch = ids(2, 6)
    want: dict[Any, Tensor] = {}
    for mix in ("a", "b", None):
        attached.set_mix(mix)
        want[mix] = attached(batch).logits
    wrong: list[Any] = []

    def work(mix: Any) -> None:
        for _ in range(8):
            with attached.using(mix), torch.no_grad():
                if not torch.allclose(attached(batch).logits, want[mix], atol=1e-6):
                    wrong.append(mix)

    threads = [threading.Thread(target=work, args=(mix,)) for mix in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("mix", [Sum({"a": 0.5}), Sum({"a": -1.0}), Sum([(Stack(["a"]), 2.0)]), Stack([("a", 0.0)])])
def test_a_weight_is_refused(mix: Any) -> None:
    attached = attached_random("prefix")
    batch = ids(2, 6)
    want = attached(batch).logits
    assert "leave it out" in refused("HK-MIX", attached.set_mix, mix).fix
    assert torch.equal(attached(batch).logits, want)


@pytest.mark.parametrize("method", METHODS)
def test_detaching_takes_every_hook_off(method: str) -> None:
    model = model_of("llama")

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    batch, before = ids(2, 6), hooks()
    want = model(batch).logits
    attached = Attached(model)
    for _ in range(2):
        attached.add("a", fresh(method, attached.sites))
        attached.add("b", fresh(method, attached.sites))
        attached.set_mix("a")
        attached(batch)
        attached.set_mix(None)
        assert torch.equal(attached(batch).logits, want)
        attached.remove("a")
        attached.remove("b")
        assert torch.equal(attached(batch).logits, want)
    assert hooks() > before
    attached.detach()
    assert hooks() == before
    assert torch.equal(model(batch).logits, want)


def test_virtual_sites_are_no_weights() -> None:
    base = Base.from_model(tiny_model("llama"))
    assert set(base.virtual) == {"kv", "tokens"}
    assert not set(base.virtual) & set(base.sites)
    assert all(site.kind == "linear" for site in base.match("all-linear"))
    assert not {s.name for s in base.match(".*(kv|tokens)?")} & set(base.virtual)
    for target in ("kv", "tokens"):
        refused("HK-TARGET", base.match, [target])


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_shapes_from_headers_and_config_alone(kind: str, recorded: bool) -> None:
    model = model_of(kind)
    live = Base.from_model(model)
    infos = {n: TensorInfo(n, "F32", tuple(p.shape), 0, 0) for n, p in model.state_dict().items()}
    config = model.config.to_dict()
    base = Base.from_headers(infos, config_values(config) if recorded else config, "x")
    assert {n: s.shape for n, s in base.virtual.items()} == {n: s.shape for n, s in live.virtual.items()}
    for method in METHODS:
        loaded = host().load(method)
        with torch.device("meta"):
            made = loaded.inject(base, loaded.info.config())
        (one,) = made.values()
        assert [p.shape for p in one.parameters()] == [
            p.shape for p in fresh(method, live, num_virtual_tokens=20).parameters().values()
        ]


def test_other_architectures_are_refused() -> None:
    from transformers import T5Config, T5EncoderModel

    base = Base.from_model(T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1)))
    for method in METHODS:
        error = refused("HK-ARCH", fresh, method, base)
        assert "llama" in str(error.want)
        assert "t5" in str(error.have)
    assert not base.virtual
    for kind, methods, why in (
        ("jamba", METHODS, "state"),
        ("openai-gpt", METHODS, "cache"),
        ("deepseek_v3", ["prefix"], "heads"),
    ):
        base = Base.from_model(model_of(kind, "eager"))
        assert set(base.virtual) == ({"tokens"} if methods == ["prefix"] else set())
        for method in methods:
            assert why in refused("HK-ARCH", fresh, method, base).what
    error = refused("HK-ARCH", fresh, "prefix", Base.from_model(model_of("falcon", alibi=True)))
    assert "ALiBi" in str(error.have)
    crossed = Base.from_model(model_of("gpt2", add_cross_attention=True))
    assert "cross attention" in str(refused("HK-ARCH", fresh, "prefix", crossed).have)


@pytest.mark.parametrize("method", METHODS)
def test_another_attention_is_refused(method: str) -> None:
    attached = attached_random(method)
    attached.config._attn_implementation = "flex_attention"
    assert "sdpa" in refused("HK-ATTENTION", attached, ids(1, 4)).fix
    attached.config._attn_implementation = "sdpa"
    attached(ids(1, 4))


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_than_the_context_holds(method: str) -> None:
    base = Base.from_model(model_of("llama"))
    assert "63" in str(refused("HK-CONFIG", fresh, method, base, num_virtual_tokens=64).want)
    refused("HK-CONFIG", fresh, method, base, num_virtual_tokens=0)
    fresh(method, base, num_virtual_tokens=63)
    attached = attached_random(method, "gpt2")
    attached(ids(1, 64 - N))
    error = refused("HK-ROW-TOO-LONG", attached, ids(1, 65 - N))
    assert f"{64 - N} tokens" in str(error.want)
    attached(ids(1, 64 - N))


def test_a_module_called_by_itself_is_the_bases_own() -> None:
    """An adapter of another base's shape is refused, and what is refused leaves no hook."""
    model = model_of("llama")
    other = fresh("prefix", Base.from_model(model_of("qwen3")))
    attached = Attached(model)
    refused("HK-SHAPE", attached.add, "a", other)
    attached.detach()
    assert not any(len(m._forward_pre_hooks) for m in model.modules())


def test_a_base_of_another_depth_than_its_config() -> None:
    model = model_of("llama")
    model.model.layers = nn.ModuleList(list(model.model.layers)[:1])
    attached = Attached(model)
    refused("HK-ARCH", attached.add, "a", fresh("prefix", attached.sites, init="zero"))
