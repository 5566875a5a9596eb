"""An adapter's deltas as a reader gets them that knows nothing but alpha / r: no line of hubkit, twenty of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file


def peft_deltas(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Module -> what is added to its weight (out, in); patterns, rsLoRA and everything else in the config unread."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            scale = config["lora_alpha"] / config["r"]
            site = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[site] = scale * (b.astype(np.float64) @ a.astype(np.float64))
    return found


def mlx_deltas(folder: Path) -> dict[str, NDArray[np.float64]]:
    """The same of MLX-LM's form: its layers add ``scale * (x @ lora_a) @ lora_b``."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))["lora_parameters"]
    tensors = load_file(folder / "adapters.safetensors")
    return {
        key.removesuffix(".lora_a"): config["scale"]
        * (a.astype(np.float64) @ tensors[key.removesuffix("a") + "b"].astype(np.float64)).T
        for key, a in tensors.items()
        if key.endswith(".lora_a")
    }
