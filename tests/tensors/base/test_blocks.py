"""Blocks: where every known architecture adds to its residual stream, live and from headers alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bases.architectures import ARCHITECTURES, VISION, config_of, known, save
from torch import Tensor, nn
from variants import refused

from hubkit.artifact.identity.config_identity import config_values
from hubkit.errors import HubkitError
from hubkit.methods.suite import tiny_model
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.arch import known_layers
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block, block_sites
from hubkit.tensors.base.choose import choose_blocks
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.live.block_hooks import BlockHooks

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("falcon", {"parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    ("falcon_h1", {"ssm_out_multiplier": 0.5, "attention_out_multiplier": 2.0}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("granite", {"residual_multiplier": 0.5}),
    ("granitemoe", {"residual_multiplier": 0.5}),
    ("granitemoehybrid", {"residual_multiplier": 0.5}),
    ("granitemoeshared", {"residual_multiplier": 0.5}),
    ("opt", {"do_layer_norm_before": False}),
    ("stablelm", {"use_parallel_residual": True}),
]
"""Layers that are built otherwise than the architecture's default, by a value of the configuration."""
ALIKE = {"xlm-roberta": "roberta"}
"""Architecture that is no row of the table of bases -> the one whose configuration does."""
CASES: list[tuple[str, dict[str, Any]]] = [(k, {}) for k in [*known(), *ALIKE] if k in known_layers()] + VARIANTS
ADDS_MORE = {"gemma4_text": "per_layer_input_gate"}
"""Architecture -> the module that is called with the residual stream after the known sub-layers; more follows it."""


def model_of(kind: str, **own: Any) -> Any:
    """The tiny model of a row of the table of bases, its biases and gains no zeros and ones."""
    import transformers

    torch.manual_seed(0)
    row = ALIKE.get(kind, kind)
    config = config_of(row)
    if row != kind:
        config = transformers.CONFIG_MAPPING[kind](**{**config.to_dict(), "model_type": kind})
    for key, value in own.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    model = getattr(transformers, ARCHITECTURES[row].saved).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def call(model: Any) -> None:
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.model_type == "t5" else {}))


class Streams:
    """What the blocks of a model see, beside what the modules that hold them get and give."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        base, paths = Base.from_model(model), {module: path for path, module in model.named_modules()}
        self.blocks = [site for site in base.sites.values() if isinstance(site, Block)]
        self.seen: dict[str, list[tuple[Block, Tensor, Tensor]]] = {}
        self.before: dict[str, Tensor] = {}
        self.after: dict[str, Tensor] = {}
        self.hooks: list[Any] = [BlockHooks(block, self._watch(block, paths, kind)) for block in self.blocks]
        for path in self.seen:
            holder = model.get_submodule(path)
            self.hooks.append(holder.register_forward_pre_hook(self._came(self.before, path), with_kwargs=True))
            if kind in ADDS_MORE:
                then = holder.get_submodule(ADDS_MORE[kind])
                self.hooks.append(then.register_forward_pre_hook(self._came(self.after, path), with_kwargs=True))
            else:
                self.hooks.append(holder.register_forward_hook(self._went(path)))

    def _watch(self, block: Block, paths: dict[nn.Module, str], kind: str) -> Any:
        assert block.module is not None
        steps = paths[block.module].split(".")
        depth = next(n for n, step in enumerate(steps) if step.isdigit())
        path = ".".join(steps[: depth + 3 if kind == "t5" else depth + 1])  # of T5, cross attention is no block
        met = self.seen.setdefault(path, [])

        def act(module: nn.Module, x: Tensor | None, y: Tensor) -> None:
            assert x is not None
            met.append((block, x.clone(), y.clone()))

        return act

    def _came(self, where: dict[str, Tensor], path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            where[path] = (args[0] if args else next(iter(kwargs.values()))).clone()

        return hook

    def _went(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
            self.after[path] = (y if isinstance(y, Tensor) else y[0]).clone()

        return hook


@pytest.mark.parametrize(("kind", "own"), CASES)
def test_a_block_takes_no_weights_place(kind: str, own: dict[str, Any]) -> None:
    """Sites are known by their names: a sub-layer that is called as a linear layer would hide it from every method."""
    base = Base.from_model(model_of(kind, **own))
    held = {site.module for site in base.sites.values() if not isinstance(site, Block)}
    lost = {n for n, m in base.model.named_modules() if type(m) is nn.Linear and m not in held}  # type: ignore[union-attr]
    assert {name for name in lost if not base.arch.skips(name)} <= {"lm_head"}


def test_a_block_that_would_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"role": "feedforward", "name": "mlp.down_proj", "residual": "post_attention_layernorm"}
    (tmp_path / "arch.json").write_text(json.dumps({"llama": {"sublayers": [own]}}))
    monkeypatch.setenv("HUBKIT_ARCH", str(tmp_path / "arch.json"))
    error = refused("HK-ARCH-FILE", Base.from_model, model_of("llama"))
    assert '"output": "mlp.down_proj"' in error.fix


@pytest.mark.parametrize(("kind", "own"), CASES)
def test_the_residual_stream_goes_on_with_the_sum(kind: str, own: dict[str, Any]) -> None:
    """A block's x is the residual stream, and what is behind a layer is that stream and every y, normed where it is."""
    model = model_of(kind, **own)
    streams = Streams(model, kind)
    call(model)
    assert len(streams.seen) >= 2
    assert {block.name for met in streams.seen.values() for block, _, _ in met} == {b.name for b in streams.blocks}
    for path, met in streams.seen.items():
        stream = after = streams.before[path]
        for block, x, y in met:
            if not alike(stream, x):  # one after the other; in parallel, all see the same
                stream = after
            assert alike(stream, x), block.name
            after = after.reshape(x.shape) + y if block.norm is None else block.norm(x + y)
        assert alike(after, streams.after[path]), path
        assert not alike(after, streams.before[path]), path
    for hook in streams.hooks:
        hook.remove()
    count = sum(map(len, streams.seen.values()))
    call(model)
    assert sum(map(len, streams.seen.values())) == count == len(streams.blocks), "each is called once; taken off"


def alike(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding of sums in another order, in fp32."""
    return bool((one.reshape(other.shape) - other).abs().max() <= 1e-5 * other.abs().max())


@pytest.mark.parametrize(("kind", "own"), CASES)
def test_headers_give_the_same_blocks(kind: str, own: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(kind, **own)
    model.save_pretrained(tmp_path)
    shards = open_shards(tmp_path)
    files = Base.from_headers(shards.headers, shards.config, "x")
    live = Base.from_model(model)
    blocks = [site for site in live.sites.values() if isinstance(site, Block)]
    assert blocks == [site for site in files.sites.values() if isinstance(site, Block)]
    assert {block.shape for block in blocks} == {(32, 32)}


@pytest.mark.parametrize(
    ("kind", "own"), [("granite", {"residual_multiplier": 0.3}), ("llama4_text", {}), ("gpt_oss", {})]
)
def test_adding_nothing_changes_no_bit(kind: str, own: dict[str, Any]) -> None:
    """Where y is multiplied, in one row, or the first of several: what is added to y comes out of the layer."""
    model = model_of(kind, **own)
    block = choose_blocks(Base.from_model(model), ("feedforward",))[-1]
    outputs: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        outputs.append(y if isinstance(y, Tensor) else y[0])

    def adding(change: float) -> Any:
        return lambda module, x, y: y + change

    model.get_submodule(block.path).register_forward_hook(note)
    call(model)
    for change in (0.0, 1.0):
        hooks = BlockHooks(block, adding(change))
        call(model)
        hooks.remove()
    plain, same, more = outputs
    assert torch.equal(plain, same)
    assert alike(plain + 1.0, more)


def test_a_model_without_its_head_has_its_blocks() -> None:
    model: Any = tiny_model("llama")
    names = [block.name for block in choose_blocks(Base.from_model(model.model), ("feedforward",))]
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


def test_a_role_that_no_layer_has_is_refused() -> None:
    with pytest.raises(HubkitError, match="HK-TARGET") as refused:
        choose_blocks(Base.from_model(model_of("mamba")), ("attention",))
    error = refused.value
    assert (error.want, error.have) == (["attention"], ["mixer: feedforward"])


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="there it is called so")
def test_a_sub_layer_that_a_release_calls_otherwise() -> None:
    """As mixtral's feed-forward before transformers 5: a layer takes the first description that its modules fit."""
    model = model_of("mixtral")
    want = [block.name for block in choose_blocks(Base.from_model(model), ("feedforward",))]
    for layer in model.model.layers:
        layer.block_sparse_moe = layer._modules.pop("mlp")
    blocks = choose_blocks(Base.from_model(model), ("feedforward",))
    assert [block.name for block in blocks] == want
    assert [block.module for block in blocks] == [layer.block_sparse_moe for layer in model.model.layers]


def test_an_architecture_that_is_not_known_is_refused() -> None:
    base = Base(
        block_sites((), Base.from_model(tiny_model("llama")).arch, {}), Base.from_model(nn.Linear(2, 2)).arch, "x"
    )
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


SEEING = [kind for kind, row in ARCHITECTURES.items() if row.saved == VISION and kind in known()]


@pytest.mark.parametrize("kind", SEEING)
def test_of_several_parts_the_blocks_are_the_language_models(kind: str, tmp_path: Path) -> None:
    """By its configuration's ``text_config``, or by what an adapter recorded of it; the tower has none."""
    save(kind, tmp_path)
    shards = open_shards(tmp_path)
    files, live = Base.from_folder(tmp_path), Base.from_model(outline(tmp_path))
    recorded = Base.from_headers(shards.headers, config_values(shards.config), "recorded")
    named = [{n: s.role for n, s in b.sites.items() if isinstance(s, Block)} for b in (files, live, recorded)]
    assert named[0] == named[1] == named[2] != {}
    assert not any("vision" in name or "visual" in name for name in named[0])
    assert files.virtual.keys() == live.virtual.keys() == recorded.virtual.keys()
    heads = [{s.name: s.tied for s in b.sites.values() if b.arch.is_head(s.name)} for b in (files, live, recorded)]
    assert heads[0] == heads[1] == heads[2] != {}
