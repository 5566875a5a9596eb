"""Bases in GGUF as llama.cpp's converters make them, of tiny models; and a reader that knows nothing of hubkit.

What converters do to weights is written out here once more, from ``conversion/llama.py``, ``gemma.py``, ``qwen.py`` and
``phi.py`` of llama.cpp b11434: other names, q and k of a Llama permuted, experts stacked, 1 added to Gemma's norms.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""``model_type`` -> ``general.architecture``."""
LAST = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "qkv_proj": "attn_qkv",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "gate_up_proj": "ffn_up",
    "w1": "ffn_gate",
    "w3": "ffn_up",
    "w2": "ffn_down",
    "gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
NORMS = {"gemma": ("post_attention_norm", "ffn_norm", "post_ffw_norm"), "": ("ffn_norm", "", "")}
"""What post_attention, pre_feedforward and post_feedforward norms are called."""
BOTH = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}


def permuted(weight: Tensor, heads: int) -> Tensor:
    """LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def converted(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    permute: bool = True,
    fuse: bool = False,
    shift: float = 1.0,
) -> dict[str, Tensor]:
    """The tensors of a GGUF, of those of a folder.

    Args:
        permute: q and k of a Llama, as its converter does.
        fuse: q, k and v into one, gate and up of experts into one (``--fuse-qkv``, ``--fuse-gate-up-exps``).
        shift: what is added to Gemma's norms; 0 for changes of weights.
    """
    arch = ARCHITECTURES[config["model_type"]]
    gemma = "gemma" if arch.startswith("gemma") else ""
    norms = dict(
        zip(
            ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            NORMS[gemma],
            strict=True,
        )
    )
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        *path, last, end = name.split(".")
        block = next((f"blk.{step}." for step in path if step.isdecimal()), "")
        mapped = norms.get(last) or LAST[last]
        wide = value.float()
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(mapped)
        if arch == "llama" and permute and heads:
            wide = permuted(wide, config[heads])
        if gemma and last.endswith("norm"):
            wide = wide + shift
        if gemma and mapped == "output":
            continue
        expert = re.search(r"experts\.(\d+)\.", name)
        if expert:
            stacks.setdefault(f"{block}{mapped}_exps.{end}", {})[int(expert[1])] = wide
        else:
            found[f"{block}{mapped}.{end}"] = wide
    found |= {name: torch.stack([one[i] for i in sorted(one)]) for name, one in stacks.items()}
    return _fused(found) if fuse else found


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for whole, members in BOTH.items():
        for first in [name for name in tensors if f".{members[0]}." in name]:
            names = [first.replace(members[0], member) for member in members]
            tensors[first.replace(members[0], whole)] = torch.cat(
                [tensors.pop(name) for name in names], dim=-2 if first.endswith("weight") else 0
            )
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    return found


def state_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def write_gguf(
    path: Path, architecture: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: str = "F32"
) -> Path:
    """A model in GGUF; matrices in the type `kind`, vectors and routers in F32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_token_list(["a", "ü", "z"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    for name, tensor in tensors.items():
        own = "F32" if tensor.dim() == 1 or "gate_inp" in name else kind
        number = gguf.GGMLQuantizationType[own]
        values = gguf.quants.quantize(tensor.contiguous().numpy(), number)
        writer.add_tensor(name, values, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_of(folder: Path, path: Path, kind: str = "F32", **how: Any) -> Path:
    """The model in `folder` as GGUF."""
    config = config_of(folder)
    return write_gguf(
        path, ARCHITECTURES[config["model_type"]], converted(state_of(folder), config, **how), config, kind
    )


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Metadata and tensors of a GGUF, in twenty lines: the format as its specification has it."""
    data, at = path.read_bytes(), 8
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def take(code: str) -> Any:
        nonlocal at
        at += struct.calcsize("<" + code)
        return struct.unpack_from("<" + code, data, at - struct.calcsize("<" + code))[0]

    def value(kind: int) -> Any:
        if kind == 8:
            return take(f"{take('Q')}s").decode()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take(codes[kind])

    count, items = take("Q"), take("Q")
    metadata = {value(8): value(take("I")) for _ in range(items)}
    table = [(value(8), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(count)]
    start, tensors = -(-at // 32) * 32, {}
    for name, shape, kind, offset in table:
        size, where = int(np.prod(shape)), start + offset
        raw = np.frombuffer(data, {0: np.float32, 1: np.float16, 30: np.uint16}[kind], size, where)
        wide = (raw.astype(np.uint32) << 16).view(np.float32) if kind == 30 else raw.astype(np.float32)
        tensors[name] = wide.reshape(shape[::-1])
    return metadata, tensors


def changes_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Tensor of the base -> what an adapter in GGUF adds to it at scale 1, by llama.cpp's formula."""
    metadata, tensors = read_gguf(path)
    alpha, found = metadata["adapter.lora.alpha"], {}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b = (tensors[f"{name}.lora_{end}"].astype(np.float64) for end in "ab")
        if name == "token_embd.weight":
            found[name] = a @ b.T * (alpha / b.shape[-1])
        else:
            found[name] = b @ a * (alpha / b.shape[-1])
    return found
