"""The architectures of the table: how a tiny random base of each is configured, made and saved.

A base has two layers (hybrids as many as it takes to have each kind of layer once), hidden size 32 and the vocabulary
of the suite's tiny tokenizer. Weights are drawn wide, so that what an adapter changes shows in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CAUSAL, VISION, MASKED, SEQ2SEQ = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
)
SEED = 1
SIZES: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
"""What a configuration gets of the values that it knows; each architecture adds its own."""


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Args:
        own: values of its configuration beside `SIZES`.
        text: of a model with several parts: ``model_type`` of its language model, another row of the table; empty for
            one of its own.
        talk: values of that language model's configuration.
        saved: the class of transformers that its checkpoints are saved by.
    """

    own: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    talk: Mapping[str, Any] = field(default_factory=dict)
    saved: str = CAUSAL


def _own(**own: Any) -> Architecture:
    return Architecture(own)


_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {**_MLA, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_MAMBA_2 = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_MROPE = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
_QWEN_EYE = {"depth": 2, "num_heads": 4, "patch_size": 8, "spatial_merge_size": 1}


def _vision(text: str, eye: Mapping[str, Any], talk: Mapping[str, Any] | None = None, **own: Any) -> Architecture:
    images = {"image_token_id": 300, "image_token_index": 300}
    return Architecture({"vision_config": eye, **images, **own}, text, talk or {}, VISION)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _own(),
    "mistral": _own(sliding_window=64),
    "ministral3": _own(
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        }
    ),
    "qwen2": _own(),
    "qwen3": _own(),
    "gemma": _own(),
    "gemma2": _own(sliding_window=64, query_pre_attn_scalar=8),
    "gemma3_text": _own(
        sliding_window=64, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": _own(),
    "openai-gpt": _own(),
    "phi": _own(),
    "phi3": _own(),
    "starcoder2": _own(),
    "olmo": _own(),
    "olmo2": _own(),
    "olmo3": _own(sliding_window=64),
    "granite": _own(),
    "cohere": _own(),
    "cohere2": _own(sliding_window=64),
    "gptj": _own(rotary_dim=4),
    "gpt_neo": _own(attention_types=[[["global", "local"], 1]], window_size=64),
    "gpt_neox": _own(),
    "gpt_bigcode": _own(num_key_value_heads=1),
    "bloom": _own(),
    "mpt": _own(),
    "stablelm": _own(),
    "falcon": _own(),
    "opt": _own(ffn_dim=48, word_embed_proj_dim=32),
    "codegen": _own(rotary_dim=4),
    "persimmon": _own(),
    "glm": _own(),
    "glm4": _own(),
    "nemotron": _own(),
    "smollm3": _own(),
    "exaone4": _own(sliding_window=64),
    "ernie4_5": _own(),
    "helium": _own(),
    "biogpt": _own(),
    "xglm": _own(ffn_dim=48),
    "arcee": _own(),
    "apertus": _own(),
    "seed_oss": _own(),
    "diffllama": _own(),
    "bitnet": _own(),
    "hunyuan_v1_dense": _own(),
    "modernbert-decoder": _own(),
    "ctrl": _own(dff=48),
    "gemma4_text": _own(
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        vocab_size_per_layer_input=320,
        hidden_size_per_layer_input=8,
        per_layer_config={"01": {"head_dim": 16}},
        num_experts=None,
        num_experts_per_tok=None,
        moe_intermediate_size=None,
    ),
    "mixtral": _own(),
    "qwen2_moe": _own(),
    "qwen3_moe": _own(),
    "deepseek_v2": _own(**{**_DEEPSEEK, "n_group": 1, "n_shared_experts": 1}),
    "deepseek_v3": _own(**_DEEPSEEK),
    "gpt_oss": _own(sliding_window=64, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "granitemoe": _own(),
    "granitemoeshared": _own(shared_intermediate_size=16),
    "olmoe": _own(),
    "phimoe": _own(router_jitter_noise=0.0),
    "glm4_moe": _own(),
    "llama4_text": _own(intermediate_size_mlp=48, interleave_moe_layer_step=2),
    "dbrx": _own(
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "dots1": _own(n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
    "hunyuan_v1_moe": _own(moe_topk=2),
    "ernie4_5_moe": _own(moe_k=2, moe_num_experts=4, moe_num_shared_experts=1),
    "flex_olmo": _own(),
    "minimax": _own(layer_types=["linear_attention", "full_attention"], block_size=8),
    "minimax_m2": _own(),
    "jetmoe": _own(kv_channels=8),
    "jamba": _own(
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    "mamba": _own(state_size=8, time_step_rank=4),
    "mamba2": _own(state_size=8, num_heads=8, n_groups=1, chunk_size=8, time_step_rank=4),
    "falcon_mamba": _own(state_size=8, time_step_rank=4),
    "bamba": _own(**_MAMBA_2, attn_layer_indices=[1]),
    "granitemoehybrid": _own(**_MAMBA_2, shared_intermediate_size=16, layer_types=["mamba", "attention"]),
    "falcon_h1": _own(**_MAMBA_2, mamba_d_ssm=64),
    "zamba2": _own(
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        num_key_value_heads=4,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=8,
        adapter_rank=4,
        use_mamba_kernels=False,
        num_mem_blocks=1,
    ),
    "recurrent_gemma": _own(
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=64,
        w_init_variance_scale=1.0,
        final_w_init_variance_scale=1.0,
    ),
    "lfm2": _own(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "qwen3_next": _own(**_LINEAR),
    "nemotron_h": _own(
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=8,
        use_mamba_kernels=False,
        moe_shared_expert_intermediate_size=16,
    ),
    "rwkv": _own(attention_hidden_size=32, context_length=256),
    "llava": _vision("llama", {"model_type": "clip_vision_model", **_CLIP}),
    "qwen2_vl": _vision("", {**_QWEN_EYE, "embed_dim": 32, "hidden_size": 32}, _MROPE),
    "qwen2_5_vl": _vision("", {**_QWEN_EYE, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48}, _MROPE),
    "gemma3": _vision("gemma3_text", {"model_type": "siglip_vision_model", **_CLIP}, mm_tokens_per_image=4),
    "paligemma": _vision(
        "gemma", {"model_type": "siglip_vision_model", **_CLIP, "projection_dim": 32}, projection_dim=32, hidden_size=32
    ),
    "idefics3": _vision("llama", _CLIP, scale_factor=1),
    "smolvlm": _vision("llama", _CLIP, scale_factor=1),
    "mllama": _vision(
        "",
        {
            **_CLIP,
            "attention_heads": 4,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        talk={"rope_scaling": {"rope_type": "default"}},
    ),
    "internvl": _vision("qwen2", {**_CLIP, "image_size": [16, 16], "patch_size": [8, 8]}),
    "mistral3": _vision("mistral", {"model_type": "pixtral", **_CLIP, "head_dim": 8}),
    "aya_vision": _vision("cohere2", {"model_type": "siglip_vision_model", **_CLIP}),
    "bert": Architecture(saved=MASKED),
    "roberta": Architecture({"max_position_embeddings": 260}, saved=MASKED),
    "modernbert": Architecture({"local_attention": 64}, saved=MASKED),
    "t5": Architecture({"d_kv": 8, "d_ff": 48, "num_decoder_layers": 2, "decoder_start_token_id": 2}, saved=SEQ2SEQ),
}
"""``model_type`` -> how its tiny base is made: decoders, mixtures of experts, state spaces and hybrids, models that
see, encoders."""


def known() -> list[str]:
    """The rows of the table that the transformers at hand has."""
    from transformers import CONFIG_MAPPING

    return [kind for kind in ARCHITECTURES if kind in CONFIG_MAPPING]


def config_of(kind: str) -> Any:
    """The configuration of the tiny base of `kind`."""
    from transformers import CONFIG_MAPPING

    one, made = ARCHITECTURES[kind], CONFIG_MAPPING[kind]
    blank = made()
    if one.saved == VISION:
        text = config_of(one.text) if one.text else sized(blank.text_config, one.talk)
        own = {key: value for key, value in one.own.items() if hasattr(blank, key)}
        return made(**own, text_config=text.to_dict())
    return sized(blank, one.own)


def sized(blank: Any, own: Mapping[str, Any], sizes: Mapping[str, Any] = SIZES) -> Any:
    """The configuration of the class of `blank` with `own` values, and of `sizes` those that it knows."""
    names = {key: blank.attribute_map.get(key, key) for key in sizes}  # GPT-2's hidden_size is its n_embd
    known = blank.to_dict()
    return type(blank)(**{**{names[key]: value for key, value in sizes.items() if names[key] in known}, **own})


def save(kind: str, folder: Path) -> None:
    """Saves the tiny base of `kind` with the suite's tokenizer into `folder`."""
    import torch
    import transformers
    from words import tokenizer

    torch.manual_seed(SEED)
    model = getattr(transformers, ARCHITECTURES[kind].saved).from_config(config_of(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are made as zeros, gains as ones: then a lost one would not show
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
