"""Decoding packed weights with a few lines of C, where a C compiler is found: the same bits, about ten times as fast.

torch has no lookup of bytes: its fastest gather decodes 1.5 GB/s on two cores, a register of sixteen values gives 12.
`nf4.c` is compiled at the first use (a second or two) and kept below hubkit's folder. It is used only once it has
decoded a sample to the very bits of torch's route; wherever anything is missing, torch decodes.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from hubkit.tensors.fourbit.nf4 import PackedWeight, decoded_by_torch, quantize
from hubkit.tensors.native import built

SMALLEST = 1 << 14
"""Values from which it is worth while: below, torch is done as soon."""
_SOURCE = Path(__file__).with_name("nf4.c")
_POINTERS = ("codes", "absmax", "nested_absmax", "nested_map", "levels", "out")


class _Weight(ctypes.Structure):
    """`Weight` of nf4.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("count", "block", "nested_block")),
        ("offset", ctypes.c_float),
        ("half", ctypes.c_int32),
    )


class Decoder:
    """A compiled library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._decode = library.hubkit_decode
        self._decode.argtypes, self._decode.restype = (ctypes.POINTER(_Weight), ctypes.c_int32), None

    def __call__(self, packed: PackedWeight, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, bfloat16 or float32."""
        out = torch.empty(packed.shape, dtype=dtype)
        given = (packed.codes, packed.absmax, packed.nested_absmax, packed.nested_map, packed.levels)
        tensors = [None if t is None else t.contiguous() for t in given]  # named, so that copies live until the end
        weight = _Weight(
            *(None if t is None else t.data_ptr() for t in tensors),
            out.data_ptr(),
            out.numel(),
            packed.block,
            packed.nested_block,
            packed.offset,
            dtype == torch.bfloat16,
        )
        self._decode(ctypes.byref(weight), torch.get_num_threads())
        return out


def decoder_for(packed: PackedWeight, dtype: torch.dtype) -> Decoder | None:
    """What decodes `packed` to `dtype`; None where torch has to."""
    count = 2 * packed.codes.numel()
    if count < SMALLEST or dtype not in (torch.bfloat16, torch.float32) or torch.compiler.is_compiling():
        return None
    tensors = [packed.codes, packed.absmax, packed.levels, packed.nested_absmax, packed.nested_map]
    if any(t is not None and (type(t) is not Tensor or t.device.type != "cpu") for t in tensors):
        return None
    return _decoder()


@functools.cache
def _decoder() -> Decoder | None:
    return built(_SOURCE, Decoder, _agrees)


def _agrees(decoder: Decoder) -> bool:
    """Whether it decodes a sample, whose last block is short, as torch does."""
    packed = quantize(torch.randn(257, 65, generator=torch.Generator().manual_seed(0)))
    kinds = (torch.bfloat16, torch.float32)
    return all(torch.equal(decoder(packed, dtype), decoded_by_torch(packed, dtype)) for dtype in kinds)
