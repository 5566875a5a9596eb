"""Blocks: where every known architecture adds to its residual stream, live and from headers alone."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.methods.suite import tiny_model
from hubkit.tensors.base.arch import known_layers
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block, block_sites
from hubkit.tensors.base.choose import choose_blocks
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.live.block_hooks import BlockHooks

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
CLASSES = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "xlm-roberta": "XLMRobertaForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
}


def model_of(family: str) -> Any:
    import transformers

    name = CLASSES.get(family, f"{family.capitalize()}ForCausalLM")
    kind = getattr(transformers, name)
    if family == "gpt2":
        options: dict[str, Any] = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 4}
    elif family == "t5":
        options = {"vocab_size": 24, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    elif "bert" in family:
        options = {**SIZES, "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 1}
    else:
        options = {**SIZES, **HEADS}
    torch.manual_seed(0)
    return kind(kind.config_class(**options)).eval()


def call(model: Any) -> None:
    ids = torch.arange(2, 14).view(2, 6)
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.model_type == "t5" else {}))


@pytest.mark.parametrize("family", known_layers())
def test_the_residual_stream_goes_on_with_the_sum(family: str) -> None:
    """What a block's x and y are follows from the next block: its x is their sum, or the norm of it."""
    model = model_of(family)
    base = Base.from_model(model)
    seen: list[tuple[Block, Tensor, Tensor]] = []

    def watch(block: Block) -> Any:
        def act(module: nn.Module, x: Tensor | None, y: Tensor) -> None:
            assert x is not None
            seen.append((block, x.clone(), y.clone()))

        return act

    hooks = [BlockHooks(block, watch(block)) for block in choose_blocks(base, ("attention", "feedforward"))]
    call(model)
    stacks = 2 if family == "t5" else 1
    assert len(seen) == len(hooks) == 4 * stacks
    assert [block.layer for block, _, _ in seen] == [n // 2 for n in range(4 * stacks)]
    checked = 0
    for (one, x, y), (other, after, _) in itertools.pairwise(seen):
        between = family == "t5" and (one.path.partition(".")[0] != other.path.partition(".")[0] or one.layer > 1)
        if (between and one.role == "attention") or (between and one.layer == 1):
            continue  # the decoder's cross-attention, and the step from the encoder to it
        total = x + y if one.norm is None else one.norm(x + y)
        assert torch.allclose(total, after, atol=1e-6), f"{one.name} -> {other.name}"
        checked += 1
    assert checked >= 3
    for hook in hooks:
        hook.remove()
    call(model)
    assert len(seen) == len(hooks), "taken off"


@pytest.mark.parametrize("family", known_layers())
def test_headers_give_the_same_blocks(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    shards = open_shards(tmp_path)
    files = Base.from_headers(shards.headers, shards.config, "x")
    live = Base.from_model(model_of(family))
    blocks = [site for site in live.sites.values() if isinstance(site, Block)]
    assert blocks == [site for site in files.sites.values() if isinstance(site, Block)]
    assert {block.shape for block in blocks} == {(16, 16)}


def test_a_model_without_its_head_has_its_blocks() -> None:
    names = [block.name for block in choose_blocks(Base.from_model(model_of("llama").model), ("feedforward",))]
    assert names == ["layers.0.mlp", "layers.1.mlp"]


def test_blocks_are_no_weights() -> None:
    base = Base.from_model(tiny_model("llama"))
    assert [s.name for s in base.match(["mlp"], "block")] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(site.kind == "linear" for site in base.match(r"model\.layers\.0\..*", ("linear", "embedding")))
    for kind in (None, "linear"):
        with pytest.raises(HubkitError, match="names a module that holds no weight"):
            base.match(["mlp"], kind)
    with pytest.raises(HubkitError, match="has no weight"):
        base.sites["model.layers.0.mlp"].weight()


def test_layers_are_chosen_by_number() -> None:
    base = Base.from_model(tiny_model("gpt2"))
    assert [b.name for b in choose_blocks(base, ("attention",), [1])] == ["transformer.h.1.attn"]
    with pytest.raises(HubkitError, match="HK-TARGET") as refused:
        choose_blocks(base, ("attention",), [1, 2, -1])
    assert (refused.value.want, refused.value.have) == (["0 to 1"], ["-1, 2"])


def test_an_architecture_that_is_not_known_is_refused() -> None:
    base = Base(block_sites((), Base.from_model(tiny_model("llama")).arch), Base.from_model(nn.Linear(2, 2)).arch, "x")
    with pytest.raises(HubkitError, match="HK-TARGET") as refused:
        choose_blocks(base, ("attention",))
    assert "llama" in refused.value.want[0]


def test_a_module_called_by_itself_and_a_copied_model() -> None:
    model = tiny_model("llama")
    block = choose_blocks(Base.from_model(model), ("feedforward",))[0]
    seen: list[Tensor | None] = []
    hooks = BlockHooks(block, lambda module, x, y: seen.append(x))
    assert block.module is not None
    block.module(torch.zeros(1, 16))
    assert seen == [None]
    copy.deepcopy(model)
    hooks.remove()
