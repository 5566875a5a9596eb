"""The values of a base's ``config.json`` that change what it computes, under one name each.

Models name them differently (``n_embd``, ``d_model``, ``hidden_size``), and transformers 5 moved some: rotary values
from ``rope_theta`` and ``rope_scaling`` into ``rope_parameters``. Values that do not change what the weights compute
(dtype, dropout, cache, versions) are not read. A value equal to its default is left out, because one version writes it
and another does not: key and value heads as many as heads, a rotary base of 10000, no sliding window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Config = Mapping[str, Any]
TEXT_TYPE: Final = "text_model_type"
"""Of the language model in a model of several parts. Recorded, never compared: releases of transformers name it
differently, and old configurations do not at all."""

_NAMES: Final = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "decoder_layers": ("num_decoder_layers", "decoder_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "vocab_size": ("vocab_size",),
    "norm_eps": (
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "layernorm_epsilon",
        "norm_epsilon",
        "norm_eps",
    ),
    "activation": ("feed_forward_proj", "hidden_activation", "hidden_act", "activation_function", "activation"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok",),
    "attention_softcap": ("attn_logit_softcapping",),
    "logits_softcap": ("final_logit_softcapping",),
    "query_scalar": ("query_pre_attn_scalar",),
    "embedding_multiplier": ("embedding_multiplier",),
    "attention_multiplier": ("attention_multiplier",),
    "residual_multiplier": ("residual_multiplier",),
    "logits_scaling": ("logits_scaling",),
    "scale_attn_by_layer": ("scale_attn_by_inverse_layer_idx",),
    "scale_attn_weights": ("scale_attn_weights",),
}
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_HEAD_DIM: Final = ("head_dim", "d_kv")
_INTERMEDIATE: Final = (
    "intermediate_size",
    "n_inner",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "ffn_hidden_size",
    "hidden_dim",
)
_DEFAULTS: Final = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "scale_attn_by_layer": False,
    "scale_attn_weights": True,
}
_ROTARY_BASE: Final = 10000.0
_ROTARY_OWN: Final = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_ROTARY_OLD: Final = {"su": "longrope"}

# fmt: off
_UNTIED: Final = frozenset({
    "apertus", "arcee", "bamba", "bitnet", "codegen", "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "doge",
    "dots1", "exaone4", "falcon_h1", "fsmt", "glm", "glm4", "glm4_moe", "gpt_neox", "gpt_oss", "gptj", "granite",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "helium", "hunyuan_v1_dense", "imagegpt", "jamba", "llama",
    "llama4", "llama4_text", "mamba2", "minimax", "ministral", "ministral3", "mistral", "mixtral", "moshi",
    "mllama_text_model", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_next",
    "reformer", "rembert", "rwkv", "seed_oss", "stablelm", "xlstm",
})
# fmt: on
"""Model types whose embeddings are not tied when the config does not say; everywhere else they are."""


def config_values(config: Config) -> dict[str, Any]:
    """The values of a parsed ``config.json`` that belong to a base's identity.

    Args:
        config: as the file holds it, or ``model.config.to_dict()``. The language model's part counts where a config
            has several (``text_config``).

    Returns:
        JSON values under this module's own names; values that are absent or default are left out.
    """
    inner = language(config)
    out: dict[str, Any] = {
        "architectures": config.get("architectures"),
        "model_type": config.get("model_type"),
        TEXT_TYPE: None if inner is config else inner.get("model_type"),
        **{name: _first(inner, names) for name, names in _NAMES.items()},
        **_sizes(inner),
        **_rotary(inner),
        "sliding_window": _window(inner),
        "tie_word_embeddings": ties(config),
    }
    return {k: v for k, v in out.items() if v is not None and (k not in _DEFAULTS or v != _DEFAULTS[k])}


def ties(config: Config) -> bool:
    """Whether input and output embeddings are one tensor, by the config or by its model type's default."""
    inner = language(config)
    value = config.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
    if value is None:
        return inner.get("model_type", config.get("model_type")) not in _UNTIED
    return bool(value)


def language(config: Config) -> Config:
    """The values of the language model: those of ``text_config`` over its own, in a config of several parts."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def _first(config: Config, names: tuple[str, ...]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _sizes(config: Config) -> dict[str, Any]:
    hidden, heads = _first(config, _NAMES["hidden_size"]), _first(config, _NAMES["heads"])
    kv_heads, head_dim = _first(config, _KV_HEADS), _first(config, _HEAD_DIM)
    inner = _first(config, _INTERMEDIATE)
    if inner is None and "n_embd" in config and _whole(hidden):
        inner = 4 * hidden
    if _whole(hidden) and _whole(heads) and heads and head_dim == hidden // heads:
        head_dim = None
    return {"kv_heads": None if kv_heads == heads else kv_heads, "head_dim": head_dim, "intermediate_size": inner}


def _rotary(config: Config) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    parameters = dict(parameters) if isinstance(parameters, Mapping) else {}
    local: Any = parameters.get("sliding_attention")
    if isinstance(main := parameters.get("full_attention"), Mapping):
        parameters = dict(main)
    theta = _given(parameters.get("rope_theta"), config, ("rope_theta", "global_rope_theta", "rotary_emb_base"))
    local_theta = local.get("rope_theta") if isinstance(local, Mapping) else None
    local_theta = _given(local_theta, config, ("rope_local_base_freq", "local_rope_theta"))
    part = _given(parameters.get("partial_rotary_factor"), config, ("partial_rotary_factor", "rotary_pct"))
    old = config.get("rope_scaling")
    return {
        "rope_theta": None if theta == _ROTARY_BASE else theta,
        "rope_local_theta": None if local_theta == _ROTARY_BASE else local_theta,
        "rope_part": None if part == 1 else part,
        "rope_scaling": _scaling({**(old if isinstance(old, Mapping) else {}), **parameters}, config),
    }


def _given(value: Any, config: Config, names: tuple[str, ...]) -> Any:
    return _first(config, names) if value is None else value


def _scaling(parameters: Config, config: Config) -> dict[str, Any] | None:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        # sections of multimodal rotary embeddings stand beside the type 'default'
        section = parameters.get("mrope_section")
        return {"mrope_section": section} if section is not None else None
    kept = {k: v for k, v in parameters.items() if v is not None and k not in _ROTARY_OWN}
    original = parameters.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if original is not None:
        kept["original_max_position_embeddings"] = original
    return {"rope_type": _ROTARY_OLD.get(kind, kind), **kept}


def _window(config: Config) -> Any:
    # Qwen keeps the size of a window it does not use; its default is not to use it
    used = config.get("use_sliding_window", not str(config.get("model_type", "")).startswith(("qwen2", "qwen3")))
    return config.get("sliding_window") if used else None


def _whole(value: Any) -> bool:
    return type(value) is int
