"""What lies in a folder that is to be adopted: one adapter of PEFT, several, or what another tool wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit.artifact.folder import MANIFEST_NAME, PEFT_CONFIG, WEIGHTS_NAME
from hubkit.artifact.identity.header import read_header
from hubkit.documents.files import read, refusing
from hubkit.documents.schema import MAX_BYTES, parse
from hubkit.errors import HubkitError

TRAINER_STATE = "trainer_state.json"
"""Where transformers' Trainer keeps losses and paths of its run, beside its optimizer's state."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_TORCHTUNE = re.compile(r"adapter_(\d+|model)\.pt")
_DIFFUSION = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "unet.", "text_encoder.")
"""Beginnings of names of tensors in adapters of image models, as kohya and diffusers write them."""


@dataclass(frozen=True)
class Tool:
    """A tool whose adapters are not PEFT's.

    Args:
        name: what its folder is called in a refusal.
        way: how its own command makes something that hubkit reads; ``{folder}`` is the folder.
    """

    name: str
    way: str


MLX = Tool(
    "an adapter of MLX",
    "mlx_lm.fuse --model BASE --adapter-path {folder} --save-path MERGED makes a whole model, with its base inside",
)
TORCHTUNE = Tool(
    "an adapter of torchtune",
    "tune run RECIPE --config CONFIG checkpointer=torchtune.training.FullModelHFCheckpointer writes PEFT's files too",
)
DIFFUSION = Tool(
    "an adapter of an image model (kohya or diffusers), not of a language model",
    "kohya: python networks/merge_lora.py --sd_model MODEL --models FILE --ratios 1 --save_to MERGED; in diffusers:"
    " pipe.load_lora_weights({folder!r}), pipe.fuse_lora(), pipe.save_pretrained(MERGED)",
)


def foreign_config(folder: Path) -> Mapping[str, Any]:
    """The ``adapter_config.json`` of a folder that holds one adapter of PEFT or AdapterHub.

    Raises:
        HubkitError: ``HK-FOREIGN`` for another tool's folder, with its way to convert; ``HK-NOT-ADAPTER`` for one
            without an adapter, or whose adapters lie in folders of their own; ``HK-JSON``, ``HK-IO``.
    """
    path = folder / PEFT_CONFIG
    config: Mapping[str, Any] = {}
    if path.is_file():
        with refusing(path):
            config = parse(read(path, MAX_BYTES), str(path))
    if tool := _tool_of(folder, config):
        raise HubkitError(
            "HK-FOREIGN", f"the folder holds {tool.name}", where=str(folder), have=_names(folder),
            want=f"an adapter of PEFT: {PEFT_CONFIG} and {WEIGHTS_NAME}", fix=tool.way.format(folder=str(folder)),
        )  # fmt: skip
    if path.is_file():
        return config
    inside = [f"{folder / name}" for name in folders_apart(folder)]
    what = "the folder's adapters lie in folders of their own" if inside else f"there is no adapter in {str(folder)!r}"
    raise HubkitError(
        "HK-NOT-ADAPTER", what, want=f"{MANIFEST_NAME} or {PEFT_CONFIG}",
        have=inside or _names(folder), where=str(folder) if inside else "",
        fix=f"hubkit pack {inside[0]}" if inside else "hubkit train makes one",
    )  # fmt: skip


def folders_apart(folder: Path) -> list[str]:
    """Names of folders inside of `folder` that are no part of its adapter: other adapters, checkpoints of Trainer.

    PEFT writes every adapter but ``default`` into a folder of its name.
    """
    if not folder.is_dir():
        return []
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    signs = (MANIFEST_NAME, PEFT_CONFIG)
    return [p.name for p in below if _CHECKPOINT.fullmatch(p.name) or any((p / sign).is_file() for sign in signs)]


def weights_of(folder: Path) -> Path:
    """Where the tensors of PEFT's adapter in `folder` should be.

    Raises:
        HubkitError: ``HK-PICKLE`` where there is only a pickle.
    """
    path = folder / WEIGHTS_NAME
    pickles = [p.name for p in folder.glob("adapter_model.*") if p.name != WEIGHTS_NAME]
    if not path.is_file() and pickles:
        raise HubkitError(
            "HK-PICKLE", "the adapter's weights are a pickle, which can run code when it is read", where=str(folder),
            want=WEIGHTS_NAME, have=", ".join(pickles), fix="save it again with safe_serialization=True",
        )  # fmt: skip
    return path


def _tool_of(folder: Path, config: Mapping[str, Any]) -> Tool | None:
    """The other tool that wrote `folder`; None for PEFT, AdapterHub and what is no adapter."""
    if not folder.is_dir() or (folder / WEIGHTS_NAME).is_file():
        return None
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if "adapters.safetensors" in names or {"fine_tune_type", "lora_parameters"} & config.keys():
        return MLX
    if any(map(_TORCHTUNE.fullmatch, names)):
        return TORCHTUNE
    if "pytorch_lora_weights.safetensors" in names or "pytorch_lora_weights.bin" in names:
        return DIFFUSION
    return DIFFUSION if any(_of_diffusion(folder / n) for n in names if n.endswith(".safetensors")) else None


def _of_diffusion(path: Path) -> bool:
    try:
        return any(name.startswith(_DIFFUSION) for name in read_header(path))
    except HubkitError:
        return False


def _names(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
