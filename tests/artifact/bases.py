"""Tiny bases on disk, written by the safetensors library: the raw material of the identity tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "intermediate_size": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "torch_dtype": "float16",
}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}, {"id": 1, "content": "</s>", "special": True}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel"},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "fuse_unk": False,
        "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4},
        "merges": [["a", "b"]],
    },
}
TOKENIZER_CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}


def tensors(seed: int = 0) -> Tensors:
    """A base's tensors in fp16: values that bf16 does not hold, and a tensor that it does."""
    draw = np.random.default_rng(seed)
    out = {"model.embed_tokens.weight": draw.normal(size=(6, 8)).astype("<f2")}
    for i in range(2):
        out[f"model.layers.{i}.self_attn.q_proj.weight"] = draw.normal(size=(8, 8)).astype("<f2")
        out[f"model.layers.{i}.mlp.up_proj.weight"] = draw.normal(size=(16, 8)).astype("<f2")
    out["model.norm.weight"] = np.array([1, -0.0, 0.5, 2**-24, np.inf, np.nan, -2, 0], "<f2")
    return out


def write_base(folder: Path, weights: Tensors | None = None, shards: int = 1, **files: Any) -> Path:
    """A base's folder; with several shards, their names are not the usual ones. Keyword arguments replace documents."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = {"config": CONFIG, "tokenizer": TOKENIZER, "tokenizer_config": TOKENIZER_CONFIG, **files}
    for name, document in documents.items():
        if document is not None:
            (folder / f"{name}.json").write_text(json.dumps(document))
    weights = tensors() if weights is None else weights
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights, reverse=True)
    index = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(index.values())):
        save_file({n: weights[n] for n in names if index[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def copy(folder: Path, to: Path) -> Path:
    """A copy of a base's folder."""
    shutil.copytree(folder, to)
    return to
