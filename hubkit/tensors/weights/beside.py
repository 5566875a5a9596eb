"""What lies beside the weight files of a merged checkpoint: their index, and the config that they have then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from hubkit.tensors.files.shards import Written

TIES = "tie_word_embeddings"


def write_index(path: Path, placed: Mapping[str, list[Written]]) -> None:
    """Writes the index of several weight files, of the tensors in each."""
    total = sum(tensor.size for tensors in placed.values() for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in placed.items() for tensor in tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")


def merged_config(config: Mapping[str, object], breaks_tie: bool, dtype: torch.dtype | None, size: int | None) -> bytes:
    """The bytes of ``config.json``, of the base's `config`.

    Args:
        breaks_tie: the output head is no longer the embedding table.
        dtype: that all tensors were cast to.
        size: of the vocabulary that has grown.
    """
    document = dict(config)
    if size is not None:
        text = document.get("text_config")
        if "vocab_size" not in document and isinstance(text, Mapping):
            document["text_config"] = {**text, "vocab_size": size}
        else:
            document["vocab_size"] = size
    if breaks_tie:
        document[TIES] = False
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in document else "dtype"
        document[key] = str(dtype).removeprefix("torch.")
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
