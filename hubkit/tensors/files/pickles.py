"""Tensors out of a pickle of weights, without running anything in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hubkit.errors import HubkitError


def read_pickle(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote of a state dict, on the CPU.

    Read by torch's own reader of weights alone, which builds tensors and containers and calls nothing else.

    Raises:
        HubkitError: ``HK-PICKLE`` for anything that is not a mapping of names to plain tensors.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or not loaded:
            raise TypeError(f"it holds {type(loaded).__name__}, not tensors by name")
        odd = [str(k) for k, v in loaded.items() if not (isinstance(k, str) and _plain(v))]
        if odd:
            raise TypeError(f"not plain tensors: {', '.join(odd[:5])}")
    except Exception as e:  # on a broken or hostile file, the reader can raise anything, without a word too
        why = str(e).partition("\n")[0][:200]
        raise HubkitError(
            "HK-PICKLE",
            "the file is not a plain pickle of weights; nothing in it was run",
            where=str(path),
            want="a state dict as torch.save writes it",
            have=f"{type(e).__name__}: {why}",
            fix="ask for safetensors, or save it again with use_safetensors=True",
        ) from e
    return {name: value.detach() for name, value in loaded.items()}


def _plain(value: object) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_quantized  # type: ignore[attr-defined]
