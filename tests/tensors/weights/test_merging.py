"""Merging: weight and bias, the files around them, ties that break, and dtypes that cannot hold the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from example_method import ia3
from safetensors.torch import load_file, save_file
from torch import Tensor

from hubkit.errors import HubkitError
from hubkit.methods.api import Delta
from hubkit.methods.config import parse_config
from hubkit.methods.host import Method, host
from hubkit.methods.suite import batch, randomize, tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.live.attached import Attached
from hubkit.tensors.live.loading import load_base
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Stack, Sum
from hubkit.tensors.weights.merging import MergedFiles, plan_merge, write_merged

IA3 = {"llama": {}, "gpt2": {"targets": ["c_attn", "c_fc"], "feedforward": ["mlp.c_proj"]}}


def tied(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, tie_word_embeddings=True, **shape)).to(dtype).eval()


def adapter(base: Base, values: Mapping[str, Any], seed: int = 1, method: Method | None = None) -> Adapter:
    method = method or host().load("lora")
    return randomize(Adapter.fresh("x", method, parse_config(method.info.config, values, "x"), base, seed), seed)


def merged(
    folder: Path, mix: Mix, adapters: Mapping[str, Adapter], out: Path, dtype: torch.dtype | None = None
) -> MergedFiles:
    out.mkdir()
    return write_merged(plan_merge(Base.from_folder(folder), mix, adapters), open_shards(folder), out, dtype)


def tensors(folder: Path) -> dict[str, Tensor]:
    shards = open_shards(folder)
    return {name: shards.read(name) for name in shards.headers}


def live(model: Any, mix: Mix, adapters: Mapping[str, Adapter]) -> Tensor:
    attached = Attached(model)
    for name, one in adapters.items():
        attached.add(name, one)
    attached.set_mix(mix)
    out: Tensor = attached(batch()).logits
    return out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "mix", ["l", Stack(["a", "l"]), Stack(["l", "a"]), Stack([("l", 0.5), "a", ("l", -2.0)]), Sum(["a", ("l", -1)])]
)
def test_stacks_of_two_methods_merge_as_they_act(family: str, mix: Mix, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "base", max_shard_size="8KB")  # type: ignore[operator]
    model = load_base(tmp_path / "base")
    base = Base.from_model(model)
    inner = ["k_proj", "down_proj"] if family == "llama" else ["c_attn", "mlp.c_proj"]
    adapters = {"l": adapter(base, IA3[family], 1, ia3()), "a": adapter(base, {"targets": inner, "rank": 2}, 2)}
    used = {n: a for n, a in adapters.items() if n == "l" or mix != "l"}
    want = live(model, mix, used)
    merged(tmp_path / "base", mix, adapters, tmp_path / "out")
    have = load_base(tmp_path / "out")(batch()).logits
    assert (have - want).abs().max() <= (1e-10 if family == "gpt2" else 1e-5) * want.abs().max()
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    biases = {n for n in before if n.endswith(("c_attn.bias", "c_fc.bias"))}
    assert {n for n in before if n.endswith("bias") and not torch.equal(before[n], after[n])} == biases


def test_a_bias_that_has_no_place_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    method = ia3()

    class AddsBias:
        def __getattr__(self, name: str) -> Any:
            return getattr(method, name)

        def merge(self, site: Site, tensors: Mapping[str, Tensor], config: Any) -> Delta:
            return Delta.full(bias=torch.ones(site.shape[0]))

    one = adapter(Base.from_folder(tmp_path / "base"), {}, 1, method)
    one.method = AddsBias()
    with pytest.raises(HubkitError, match="the base has none there"):
        merged(tmp_path / "base", "a", {"a": one}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_delta_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = Base.from_model(tiny_model("llama"))
    method = ia3()
    one = adapter(base, {}, 1, method)

    class Broadcasts:
        def __getattr__(self, name: str) -> Any:
            return getattr(method, name)

        def merge(self, site: Site, tensors: Mapping[str, Tensor], config: Any) -> Delta:
            return Delta.full(torch.ones(1, site.shape[1]))

    one.method = Broadcasts()
    site = next(iter(one.sites.values()))
    with pytest.raises(HubkitError, match="merges into another shape"):
        plan_merge(base, "a", {"a": one}).weight(site)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["q_proj"]])
def test_a_tie_breaks_when_one_half_changes(targets: list[str], twice: bool, tmp_path: Path) -> None:
    """`twice`: the base's files hold the shared weight under both names."""
    tied().save_pretrained(tmp_path / "base")
    if twice:
        path = tmp_path / "base" / "model.safetensors"
        both = load_file(path)
        both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
        save_file(both, path, {"format": "pt"})
    model = load_base(tmp_path / "base")
    adapters = {"a": adapter(Base.from_model(model), {"targets": targets, "rank": 2})}
    want = live(model, "a", adapters)
    done = merged(tmp_path / "base", "a", adapters, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (targets == ["q_proj"])
    after = tensors(tmp_path / "out")
    assert ("lm_head.weight" in after) is (twice or targets != ["q_proj"])
    assert done.files.keys() == {"model.safetensors"}
    have = load_base(tmp_path / "out")(batch()).logits
    assert (have - want).abs().max() <= 1e-5 * max(1.0, float(want.detach().abs().max()))


def test_the_index_tells_where_everything_is(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    adapters = {"a": adapter(Base.from_folder(tmp_path / "base"), {"targets": ["lm_head", "q_proj"], "rank": 2})}
    done = merged(tmp_path / "base", "a", adapters, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    places = {n: f for f in done.files for n in load_file(tmp_path / "out" / f)}
    assert index["weight_map"] == places
    assert "lm_head.weight" in places
    stored = tensors(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert set(done.files) == set(open_shards(tmp_path / "base").files())
    untouched = set(stored) - {n for n in stored if "q_proj" in n or n == "lm_head.weight"}
    before = tensors(tmp_path / "base")
    assert all(torch.equal(stored[n], before[n]) for n in untouched)


def test_one_shard_behind_an_index_keeps_its_index(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "one.safetensors")
    table = dict.fromkeys(load_file(tmp_path / "base" / "one.safetensors"), "one.safetensors")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    adapters = {"a": adapter(Base.from_folder(tmp_path / "base"), {"targets": ["q_proj"], "rank": 2})}
    merged(tmp_path / "base", "a", adapters, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        "one.safetensors",
    }
    load_base(tmp_path / "out")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16, None])
def test_one_cast_from_the_accumulated_sum(stored: torch.dtype, wanted: torch.dtype | None, tmp_path: Path) -> None:
    tied(stored).save_pretrained(tmp_path / "base")
    base = Base.from_folder(tmp_path / "base")
    adapters = {n: adapter(base, {"targets": ["q_proj"], "rank": 2}, s) for s, n in enumerate("ab")}
    merged(tmp_path / "base", Sum({"a": 0.7, "b": -0.3}), adapters, tmp_path / "out", wanted)
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert {t.dtype for t in after.values()} == {wanted or stored}
    name = "model.layers.0.self_attn.q_proj"
    first, second = (adapters[n].delta(base.sites[name]) for n in "ab")
    assert first is not None
    assert second is not None
    change = first.scaled(0.7).plus(second.scaled(-0.3)).matrix()
    assert change is not None
    want = before[f"{name}.weight"].double() + change.double()
    gap = torch.finfo(wanted or stored).eps * want.abs().max()
    assert (after[f"{name}.weight"].double() - want).abs().max() <= gap
    kept = "model.norm.weight"
    assert torch.equal(after[kept], before[kept].to(wanted or stored))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(wanted or stored).removeprefix("torch.")
    assert load_base(tmp_path / "out").dtype == (wanted or stored)


@pytest.mark.parametrize("where", ["merged weight", "merged bias", "untouched"])
def test_what_leaves_the_range_of_a_dtype_is_refused(where: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2").float()
    with torch.no_grad():
        block: Any = model.transformer.h[0]  # type: ignore[union-attr, index]
        if where == "merged weight":
            block.attn.c_attn.weight[0, 0] = 1e5
        elif where == "merged bias":
            block.attn.c_attn.bias[0] = 1e5
        else:
            block.ln_1.weight[0] = 1e5
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    adapters = {"l": adapter(Base.from_folder(tmp_path / "base"), IA3["gpt2"], 1, ia3())}
    with pytest.raises(HubkitError) as caught:
        merged(tmp_path / "base", "l", adapters, tmp_path / "out", torch.float16)
    assert (caught.value.code, caught.value.fix) == ("HK-NAN", "--dtype float32")
    merged(tmp_path / "base", "l", adapters, tmp_path / "wide")


def test_integers_are_not_cast(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file(load_file(path) | {"model.ids": torch.arange(5)}, path, {"format": "pt"})
    adapters = {"a": adapter(Base.from_folder(tmp_path / "base"), {"targets": ["q_proj"], "rank": 2})}
    merged(tmp_path / "base", "a", adapters, tmp_path / "out", torch.bfloat16)
    assert torch.equal(tensors(tmp_path / "out")["model.ids"], torch.arange(5))


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    tied().save_pretrained(tmp_path / "base", max_shard_size="8KB")
    made = []
    for out in ("one", "two"):
        adapters = {"a": adapter(Base.from_folder(tmp_path / "base"), {})}
        merged(tmp_path / "base", "a", adapters, tmp_path / out)
        made.append({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()})
    assert made[0] == made[1]
