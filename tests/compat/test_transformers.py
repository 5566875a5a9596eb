"""transformers still is what `hubkit.compat.transformers` takes it for, and was: ``make test-older``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.utils import logging
from zoo import ids, model_of

from hubkit.compat import transformers as insides
from hubkit.compat.huggingface_hub import helpers
from hubkit.errors import HubkitError
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.live.loading import load_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(params=[(logging.INFO, True), (logging.WARNING, False)], ids=["loud", "as it is"])
def settings(request: pytest.FixtureRequest) -> Any:
    """How much a user lets transformers say: (verbosity, whether progress bars are shown)."""
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), helpers().are_progress_bars_disabled()
    verbosity, bars = request.param
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    (helpers().enable_progress_bars if bars else helpers().disable_progress_bars)()
    yield verbosity, bars, not bars
    logging.set_verbosity(before[0])
    (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
    (helpers().disable_progress_bars if before[2] else helpers().enable_progress_bars)()


def now() -> tuple[int, bool, bool]:
    return logging.get_verbosity(), logging.is_progress_bar_enabled(), helpers().are_progress_bars_disabled()


def test_it_is_silent_inside_and_says_what_it_said_before_afterwards(settings: Any, tiny_llama: Path) -> None:
    with insides.quiet():
        assert now()[:2] == (logging.ERROR, False)
    assert now() == settings
    load_base(tiny_llama, device="cpu")
    load_tokenizer(tiny_llama)
    assert now() == settings
    with pytest.raises(HubkitError):
        load_tokenizer(tiny_llama / "nothing here")
    assert now() == settings


def test_the_last_thread_out_restores(settings: Any) -> None:
    inside, leave = threading.Barrier(2), threading.Event()

    def other() -> None:
        with insides.quiet():
            inside.wait(60)
            leave.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(60)
    with insides.quiet():
        pass
    assert now()[0] == logging.ERROR, "another thread is still inside"
    leave.set()
    thread.join()
    assert now() == settings


def test_the_attention_that_was_chosen() -> None:
    model = model_of("llama")
    assert insides.attention_of(model.config) == "sdpa"
    model.set_attn_implementation("eager")
    assert insides.attention_of(model.config) == insides.attention_of(model.model.config) == "eager"
    assert insides.attention_of(None) is None


def test_the_commit_that_a_configuration_came_from(tmp_path: Path) -> None:
    """In a cache as the Hub's client lays it out. A release that tells it again is a gain: then this fails, too."""
    repo = tmp_path / "models--ana--chat"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    model_of("llama").config.save_pretrained(repo / "snapshots" / COMMIT)
    config = transformers.AutoConfig.from_pretrained("ana/chat", cache_dir=tmp_path, local_files_only=True)
    assert insides.commit_of(config) == (COMMIT if transformers.__version__.startswith("4.") else None)
    assert insides.commit_of(model_of("llama").config) is None


class Empty(nn.Module):
    """A layer that is loaded by somebody else."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.shape = like.weight.shape


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_are_replaced_before_there_are_weights(kind: str, tmp_path: Path) -> None:
    """The rest of the model is loaded, bit by bit, and nothing says afterwards that it was quantized."""
    name = {"llama": "model.layers.1.mlp.up_proj", "gpt2": "transformer.h.1.mlp.c_fc"}[kind]
    model = model_of(kind)
    model.save_pretrained(tmp_path)
    seen: list[str] = []

    def prepare(empty: Any) -> None:
        seen.extend(name for name, tensor in empty.named_parameters() if tensor.device.type != "meta")
        empty.set_submodule(name, Empty(empty.get_submodule(name)))

    loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=insides.quantization(prepare), output_loading_info=True
    )
    assert seen == [], "there are no values yet"
    assert type(loaded) is type(model)
    assert isinstance(loaded.get_submodule(name), Empty)
    want = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{name}.")}
    assert loaded.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[key]) for key, value in loaded.state_dict().items())
    assert {key.partition(f"{name}.")[1] for key in found["unexpected_keys"]} == {f"{name}."}
    assert not found["missing_keys"]
    assert not hasattr(loaded.config, "quantization_config")
    assert not getattr(loaded, "is_quantized", False)
    assert getattr(loaded, "hf_quantizer", None) is None
    assert loaded.float() is loaded
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()


def test_adapters_make_a_quantized_model_trainable() -> None:
    """transformers' Trainer refuses to train a model that is quantized, unless it says that adapters are there."""
    from transformers import trainer_utils

    class Quantized(nn.Module):
        is_quantized = True

    class WithAdapters(insides.AdaptersLoaded, Quantized): ...

    check = getattr(trainer_utils, "validate_quantization_for_training", None)
    if check is None:
        pytest.skip("in transformers 4 it stands in Trainer's constructor: tests/verbs/test_trainer_callback.py")
    with pytest.raises(ValueError, match="quantized"):
        check(Quantized())
    check(WithAdapters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_checkpoint_by_the_function_that_is_set(kind: str) -> None:
    model = model_of(kind).train()
    able = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert able
    assert all(insides.checkpoint_of(module) is None for module in able)
    model.gradient_checkpointing_enable()
    own = [insides.checkpoint_of(module) for module in able]
    assert all(function is not None for function in own)
    called: list[str] = []

    def checkpoint(layer: Any, *args: Any, **kwargs: Any) -> Any:
        called.append("layer")
        return own[0](layer, *args, **kwargs)  # type: ignore[misc]

    for module in able:
        insides.set_checkpoint(module, checkpoint)
    model(input_ids=ids(1, 4)).logits.sum().backward()
    assert len(called) == 2, "one call for each layer"


def lengthen(model: Any, by: int) -> None:
    """Has the head of `model` answer with so many more logits."""
    model.get_output_embeddings().register_forward_hook(lambda m, a, y: torch.cat([y, y[..., :by]], -1))


SMALL = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
BART = {"vocab_size": 48, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
OTHERS = {
    "mamba": ("MambaForCausalLM", {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}),
    "bart": ("BartForCausalLM", BART),
    "bert": ("BertForMaskedLM", SMALL),
    "roberta": ("RobertaForMaskedLM", SMALL),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "vocab_size": 48,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
}
"""Models that are no decoders like llama: class, sizes."""


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "gemma3_text", *OTHERS])
def test_who_flattens_logits_by_its_own_size(kind: str) -> None:
    """Those and no others cannot do with longer ones."""
    if kind in OTHERS:
        name, sizes = OTHERS[kind]
        made = getattr(transformers, name)
        model = made(made.config_class(**sizes))
    else:
        model = model_of(kind)
    lengthen(model, 3)
    with insides.lengthened_loss(model, lambda: True):
        try:
            loss = model(input_ids=ids(2, 6), labels=ids(2, 6)).loss
            flattens = False
            assert torch.isfinite(loss)
        except (RuntimeError, ValueError):
            flattens = True
    assert insides.flattens_by_its_size(model) is flattens
    assert flattens is (kind in ("bart", "bert", "roberta")), "what the docstring says"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_loss_of_logits_that_are_longer(kind: str) -> None:
    model = model_of("mixtral", num_local_experts=2) if kind == "mixtral" else model_of(kind)
    batch = {"input_ids": ids(2, 6), "labels": ids(2, 6)}
    plain, state = model(**batch).loss, set(vars(model))
    lengthen(model, 3)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        model(**batch)
    longer = [True]
    with insides.lengthened_loss(model, lambda: longer[0]):
        loss, logits = model(**batch).loss, model(**batch).logits
        want = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert torch.isclose(loss, want, rtol=1e-5)
        longer[0] = False
        with pytest.raises(RuntimeError, match=r"shape|size"):
            model(**batch)
    assert set(vars(model)) == state
    assert not torch.isclose(plain, loss, rtol=1e-5)


def test_a_loss_that_a_user_has_set_is_kept() -> None:
    model = model_of("llama")

    def own(logits: Any, labels: Any, vocab_size: int, **others: Any) -> torch.Tensor:
        return torch.tensor(float(vocab_size))

    model.loss_function = own
    lengthen(model, 3)
    batch = {"input_ids": ids(1, 4), "labels": ids(1, 4)}
    with insides.lengthened_loss(model, lambda: True):
        assert model(**batch).loss == 51
    assert model.loss_function is own
    assert model(**batch).loss == 48
    with insides.lengthened_loss(nn.Linear(1, 1), lambda: True):
        pass


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text", "phi"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_very_positions_that_are_given_reach_every_attention(kind: str, checkpointed: bool) -> None:
    """Virtual tokens of a forward travel on it (`hubkit.tensors.front.decoder_hooks`), into its recomputation, too."""
    model = model_of(kind).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    positions, seen = torch.arange(4)[None], list[bool]()

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs.get("position_ids") is positions)

    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    for attention in attentions:
        attention.register_forward_pre_hook(look, with_kwargs=True)
    model(input_ids=ids(1, 4), position_ids=positions).logits.sum().backward()
    assert seen == [True] * len(attentions) * (2 if checkpointed else 1)


@pytest.mark.parametrize("filled", [0, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_number_of_keys_after_a_forward(filled: int, tokens: int) -> None:
    model = model_of("llama")
    cache = transformers.DynamicCache(config=model.config)
    if filled:
        model(input_ids=ids(1, filled), past_key_values=cache, use_cache=True)
    assert insides.keys_after(cache, tokens, 1) == filled + tokens
    model(input_ids=ids(1, tokens), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length(1) == filled + tokens
    assert insides.keys_after(None, tokens, 1) == tokens


def test_who_keeps_some_weights_wide() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
        assert insides.keeps_some_wide(t5)
        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        assert not insides.keeps_some_wide(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)))


def test_buffers_are_computed_again(tiny_llama: Path) -> None:
    """What no file holds is what a model that is loaded has; before transformers 5 it is there from the beginning."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama)
    wanted = {name: buffer.clone() for name, buffer in loaded.named_buffers()}
    assert wanted
    if int(transformers.__version__.partition(".")[0]) >= 5:
        for buffer in loaded.buffers():
            buffer.fill_(float("nan"))
    with torch.no_grad():
        insides.compute_buffers(loaded)
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, wanted[name])
