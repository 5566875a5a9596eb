"""Dtypes by their names in safetensors files, both ways."""

from __future__ import annotations

import torch

from hubkit.errors import HubkitError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
COMPUTING = ("F64", "F32", "F16", "BF16")
"""Those in which the tensors of an adapter can be: float8 is a way to store them, integers are something else."""
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name.

    Raises:
        HubkitError: ``HK-DTYPE`` for one that torch has no counterpart of here.
    """
    if name not in _DTYPES:
        raise HubkitError("HK-DTYPE", f"tensors of dtype {name} are not supported", want=", ".join(_DTYPES), have=name)
    return _DTYPES[name]


def dtype_named(name: str | None) -> torch.dtype | None:
    """``float32``, ``bfloat16`` or ``float16`` (and ``float64``) as a torch dtype; None stays None.

    Raises:
        HubkitError: ``HK-DTYPE``.
    """
    known = {str(d).removeprefix("torch."): d for d in DTYPE_NAMES if d.is_floating_point and d.itemsize > 1}
    if name is not None and name not in known:
        raise HubkitError("HK-DTYPE", f"unknown dtype {name!r}", want=", ".join(sorted(known)), have=name)
    return None if name is None else known[name]
