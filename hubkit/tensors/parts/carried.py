"""Checking an adapter that is only carried: its tensors' places, dtypes and values; see `hubkit.artifact.carried`."""

from __future__ import annotations

from pathlib import Path

from hubkit.artifact.carried import modules_of
from hubkit.artifact.identity.header import read_header
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.values import require_finite

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Those that PEFT's types store: values, and indices of them."""


def check_carried(peft_type: str, weights: Path, base: Base) -> tuple[int, list[str]]:
    """The number of an adapter's tensors, and the modules of the base that they are at, all of them checked.

    Raises:
        HubkitError: ``HK-SAFETENSORS``, ``HK-MISSING``; ``HK-KEYS`` for tensors without a place in the base;
            ``HK-DTYPE``; ``HK-NAN``.
    """
    from safetensors import safe_open

    header = read_header(weights)
    modules = modules_of(peft_type, header, base.modules(), str(weights))
    if wrong := [f"{info.name}: {info.dtype}" for info in header.values() if info.dtype not in DTYPES]:
        raise HubkitError(
            "HK-DTYPE",
            f"{len(wrong)} tensors of the adapter are in a dtype that nothing computes in",
            where=str(weights),
            want=", ".join(DTYPES),
            have=wrong,
            fix="save it again in bfloat16 or float32",
        )
    with safe_open(weights, framework="pt") as file:
        require_finite(((name, file.get_tensor(name)) for name in header), str(weights))
    return len(header), modules
