"""The base as adapters see it: the same sites from a live model and from its files; targets strict, refusals named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubkit.errors import HubkitError
from hubkit.methods.suite import tiny_model
from hubkit.tensors.base.arch import arch_of
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.live.loading import load_base

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **options))


def bert() -> Any:
    from transformers import BertConfig, BertLMHeadModel

    return BertLMHeadModel(BertConfig(is_decoder=True, **SIZES))


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForCausalLM

    return RobertaForCausalLM(RobertaConfig(is_decoder=True, **SIZES))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-bias": lambda: llama(attention_bias=True),
    "gpt2": lambda: tiny_model("gpt2"),
    "bert": bert,
    "roberta": roberta,
}


@pytest.fixture
def base() -> Base:
    return Base.from_model(tiny_model("llama"))


def refused(base: Base, targets: Any, kind: Any = None) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        base.match(targets, kind)
    assert caught.value.code == "HK-TARGET"
    return caught.value


def same(one: Base, two: Base) -> None:
    assert list(one.sites) == list(two.sites)
    assert one.sites == two.sites
    for name, site in ((n, s) for n, s in one.sites.items() if s.kind != "block"):
        assert torch.equal(site.weight(), two.sites[name].weight()), name
        assert site.weight().shape == site.shape
        bias, other = site.bias(), two.sites[name].bias()
        assert (bias is None) == (other is None)
        assert bias is None or (other is not None and torch.equal(bias, other))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shards", ["1GB", "4KB"])
def test_live_and_files_give_the_same_sites(model: str, shards: str, tmp_path: Path) -> None:
    MODELS[model]().save_pretrained(tmp_path, max_shard_size=shards)
    assert (shards == "1GB") == (tmp_path / "model.safetensors").exists()
    same(Base.from_model(load_base(tmp_path)), Base.from_folder(tmp_path))


def test_old_files_without_prefix_give_the_same_sites(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    path = tmp_path / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(path).items()}, path, {"format": "pt"})
    live, files = Base.from_model(load_base(tmp_path)), Base.from_folder(tmp_path)
    assert list(live.sites) == list(files.sites)
    assert files.sites["transformer.h.0.attn.c_attn"].tensor == "h.0.attn.c_attn.weight"
    weights = {n: site for n, site in live.sites.items() if site.kind != "block"}
    assert all(torch.equal(site.weight(), files.sites[n].weight()) for n, site in weights.items())


def test_a_tied_head_held_twice_is_tied_all_the_same(tmp_path: Path) -> None:
    """Some repositories store both; transformers ties them again when it loads."""
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    files = Base.from_folder(tmp_path)
    same(Base.from_model(load_base(tmp_path)), files)
    assert (files.sites["lm_head"].tied, files.sites["lm_head"].tensor) == (True, "model.embed_tokens.weight")


def test_an_untied_head_is_its_own() -> None:
    head = Base.from_model(llama(tie_word_embeddings=False)).sites["lm_head"]
    assert (head.tied, head.tensor) == (False, "lm_head.weight")


def test_a_headless_model_has_no_head_invented(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for classes in (["LlamaModel"], None, "LlamaForCausalLM", []):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": classes}))
        assert "lm_head" not in Base.from_folder(tmp_path).sites


def test_sites_come_in_natural_order() -> None:
    names = [f"layers.{n}.q" for n in (10, 9, 2, 0)] + ["head"]
    sites = [Site(n, "linear", (2, 2), torch.float32, False, n, None) for n in names]
    assert list(Base(sites, arch_of(""), "x").sites) == ["head", *(f"layers.{n}.q" for n in (0, 2, 9, 10))]


def test_headers_alone_have_no_weight(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    from hubkit.tensors.files.shards import open_shards

    shards = open_shards(tmp_path)
    site = Base.from_headers(shards.headers, shards.config, "x").sites["model.layers.0.self_attn.q_proj"]
    with pytest.raises(HubkitError, match="HK-BASE-NEEDED"):
        site.weight()


def test_all_linear_is_every_linear_but_the_head(base: Base) -> None:
    names = [site.name for site in base.match("all-linear")]
    assert len(names) == 14
    assert not [n for n in names if "head" in n or "embed" in n]


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 2),
        (["q_proj", "v_proj"], 4),
        (["self_attn.q_proj"], 2),
        (["layers.1.self_attn.q_proj"], 1),
        (["model.layers.1.self_attn.q_proj"], 1),
        (r".*\.(q|v)_proj", 4),
        (r"model\.layers\.0\..*", 7),
        (["lm_head"], 1),
        (["embed_tokens"], 1),
        (["q_proj", "self_attn.q_proj"], 2),
        ([], 0),
    ],
)
def test_targets(base: Base, targets: Any, count: int) -> None:
    found = base.match(targets)
    assert len(found) == count
    assert [s.name for s in found] == [n for n in base.sites if n in {s.name for s in found}]


@pytest.mark.parametrize("targets", [["q_proj", "q_prj"], ["q_prj"], "q_prj", ["proj"], [".q_proj"], ["q_proj."]])
def test_one_target_that_matches_nothing_is_refused(base: Base, targets: Any) -> None:
    error = refused(base, targets)
    assert "matches nothing" in error.what
    assert error.want[0].startswith("one of: q_proj (2) k_proj (2)") or "q_proj (2)" in error.want[0]


def test_the_nearest_names_are_given(base: Base) -> None:
    assert refused(base, ["q_prj"]).fix.startswith("near: q_proj")
    assert refused(base, ["layers.7.self_attn.q_proj"]).fix.startswith("near: ")
    assert "names a module that holds no weight" in refused(base, ["self_attn"]).what
    assert refused(base, r".*\.x_proj").have == [r".*\.x_proj"]


def test_a_kind_that_the_method_cannot_serve_is_refused(base: Base) -> None:
    error = refused(base, ["q_proj", "embed_tokens"], "linear")
    assert error.have == ["model.embed_tokens: embedding"]
    assert len(base.match(["q_proj", "embed_tokens"], ("linear", "embedding"))) == 3


@pytest.mark.parametrize(
    "targets", ["(", "a{2,1}", "(a+)+", "x*" * 501, r"(\w+\.?)+!", "(" * 490 + ")" * 490, "a{99999999999}"]
)
def test_an_expression_that_is_not_usable_is_refused(base: Base, targets: str) -> None:
    assert "not a usable regular expression" in refused(base, targets).what


def test_weights_are_out_by_in_whatever_the_storage() -> None:
    model = tiny_model("gpt2")
    base = Base.from_model(model)
    site = base.sites["transformer.h.0.mlp.c_fc"]
    assert (site.shape, site.transposed, site.bias_tensor) == ((64, 16), True, "transformer.h.0.mlp.c_fc.bias")
    x = torch.randn(3, 16, dtype=torch.float64)
    assert site.module is not None
    have = torch.nn.functional.linear(x, site.weight(), site.bias())
    assert torch.allclose(have, site.module(x), atol=1e-12)
    assert base.sites["transformer.wte"].shape == (16, 48)
    assert base.sites["lm_head"].tied
