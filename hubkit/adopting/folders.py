"""What lies in a folder that is to be adopted: one adapter of PEFT, several, or what another tool wrote."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
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


@dataclass(frozen=True)
class Tool:
    """A tool whose adapters are not PEFT's, and by what they are known: a file, or one of the rest.

    Args:
        name: what its folder is called in a refusal.
        files: expression for the names of its files.
        config: keys of ``adapter_config.json`` that it alone writes.
        tensors: beginnings of the names of tensors in any safetensors file.
        way: how its own command makes something that hubkit reads; ``{folder}`` is the folder.
    """

    name: str
    files: str
    config: Sequence[str]
    tensors: Sequence[str]
    way: str


@functools.cache
def tools() -> tuple[Tool, ...]:
    """The tools that are known, from ``tools.json``."""
    return tuple(Tool(**one) for one in json.loads((files("hubkit.adopting") / "tools.json").read_text("utf-8")))


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
            "HK-FOREIGN",
            f"the folder holds {tool.name}",
            where=str(folder),
            have=_names(folder),
            want=f"an adapter of PEFT: {PEFT_CONFIG} and {WEIGHTS_NAME}",
            fix=tool.way.format(folder=str(folder)),
        )
    if path.is_file():
        return config
    inside = [f"{folder / name}" for name in folders_apart(folder)]
    what = "the folder's adapters lie in folders of their own" if inside else f"there is no adapter in {str(folder)!r}"
    raise HubkitError(
        "HK-NOT-ADAPTER",
        what,
        want=f"{MANIFEST_NAME} or {PEFT_CONFIG}",
        have=inside or _names(folder),
        where=str(folder) if inside else "",
        fix=f"hubkit pack {inside[0]}" if inside else "hubkit train makes one",
    )


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
            "HK-PICKLE",
            "the adapter's weights are a pickle, which can run code when it is read",
            where=str(folder),
            want=WEIGHTS_NAME,
            have=", ".join(pickles),
            fix="save it again with safe_serialization=True",
        )
    return path


def _tool_of(folder: Path, config: Mapping[str, Any]) -> Tool | None:
    """The other tool that wrote `folder`; None for PEFT, AdapterHub and what is no adapter."""
    if not folder.is_dir() or (folder / WEIGHTS_NAME).is_file():
        return None
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for tool in tools():
        if any(re.fullmatch(tool.files, name) for name in names) or any(key in config for key in tool.config):
            return tool
    keys = [key for name in names if name.endswith(".safetensors") for key in _tensors(folder / name)]
    return next((tool for tool in tools() if any(key.startswith(tuple(tool.tensors)) for key in keys)), None)


def _tensors(path: Path) -> list[str]:
    try:
        return list(read_header(path))
    except HubkitError:
        return []


def _names(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir())[:10]) if folder.is_dir() else "no such folder"
