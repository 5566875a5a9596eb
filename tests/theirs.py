"""Adapters that real PEFT made and saved, and changes to their files: what `pack` is given to adopt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from hubkit.tensors.live.loading import load_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def made_by_peft(base: Path | Any, folder: Path, config: Any = None, **options: Any) -> Any:
    """The model of PEFT whose adapter, random and not identity, was saved into `folder`.

    Args:
        base: folder of the base, or a live one.
        config: PEFT's configuration; a LoRA of q_proj and v_proj by default, changed by `options`.
    """
    chosen = config or peft.LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options})
    torch.manual_seed(5)
    model = peft.get_peft_model(load_base(base) if isinstance(base, Path) else base, chosen)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.eval().save_pretrained(folder)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter."""
    from safetensors.torch import load_file

    loaded: dict[str, Tensor] = load_file(folder / WEIGHTS)
    return loaded


def rewrite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Puts `tensors` in place of a saved adapter's."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / WEIGHTS)


def set_options(folder: Path, **changes: Any) -> None:
    """Sets keys of a saved adapter's configuration."""
    document = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**document, **changes}))
