"""One config, as transformers 4.57 and 5 write it, as old repositories leave it out."""

from __future__ import annotations

from typing import Any

import pytest

from hubkit.artifact.identity.config_identity import TEXT_TYPE, config_values, ties

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

PAIRS = [
    ({}, {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "use_cache": False}),
    ({}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "float32"}),
    ({}, {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False, "sliding_window": None}),
    ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 500000, "rope_type": "default"}}),
    (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
    ),
    (
        {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            }
        },
    ),
    (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_ways_to_say_it(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert config_values({**LLAMA, **one}) == config_values({**LLAMA, **other})


CHANGES: list[dict[str, Any]] = [
    {"rope_theta": 20000.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_local_base_freq": 5000.0},
    {"partial_rotary_factor": 0.25},
    {"sliding_window": 128},
    {"num_key_value_heads": 2},
    {"head_dim": 32},
    {"tie_word_embeddings": True},
    {"architectures": ["LlamaModel"]},
    {"model_type": "mistral"},
    {"rms_norm_eps": 1e-5},
    {"hidden_act": "gelu"},
    {"vocab_size": 33},
    {"intermediate_size": 256},
    {"logits_scaling": 8.0},
    {"final_logit_softcapping": 30.0},
]


def test_every_value_counts() -> None:
    seen = [config_values(LLAMA), *(config_values({**LLAMA, **change}) for change in CHANGES)]
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])


def test_names_of_gpt2() -> None:
    values = config_values(GPT2)
    assert values["hidden_size"] == 64
    assert values["intermediate_size"] == 256
    assert values["tie_word_embeddings"] is True
    assert values == config_values({**GPT2, "n_inner": None, "scale_attn_weights": True})
    assert values != config_values({**GPT2, "scale_attn_by_inverse_layer_idx": True})


def test_a_window_that_is_not_used() -> None:
    qwen = {**LLAMA, "model_type": "qwen2"}
    unused = config_values({**qwen, "sliding_window": 4096, "use_sliding_window": False})
    assert unused == config_values({**qwen, "sliding_window": None}) == config_values({**qwen, "sliding_window": 4096})
    assert unused != config_values({**qwen, "sliding_window": 4096, "use_sliding_window": True})
    assert config_values({**LLAMA, "model_type": "mistral", "sliding_window": 4096})["sliding_window"] == 4096


def test_the_language_part_of_a_config() -> None:
    whole = {"model_type": "llava", "architectures": ["X"], "text_config": LLAMA, "tie_word_embeddings": False}
    own = {"model_type": "llava", "architectures": ["X"], TEXT_TYPE: "llama"}
    assert config_values(whole) == {**config_values(LLAMA), **own}


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"model_type": "llama"}, False),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "bert"}, True),
        ({"model_type": "gpt2", "tie_word_embeddings": False}, False),
        ({"model_type": "x", "text_config": {"model_type": "llama"}}, False),
    ],
)
def test_ties_by_the_default_of_the_model_type(config: dict[str, Any], tied: bool) -> None:
    assert ties(config) is tied


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "t5", "bert"]
)
def test_the_installed_transformers_writes_what_we_read(name: str) -> None:
    config_class = pytest.importorskip("transformers").AutoConfig.for_model(name).__class__
    config = config_class()
    config.architectures = ["X"]
    whole = config_values(config.to_dict())
    assert {"hidden_size", "layers", "heads", "vocab_size", "norm_eps", "activation", "model_type"} <= whole.keys()
    assert whole["tie_word_embeddings"] == config.tie_word_embeddings == ties({"model_type": name})
    assert whole == config_values(config_class.from_dict(config.to_dict()).to_dict())
