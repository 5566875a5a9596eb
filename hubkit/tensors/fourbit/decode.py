"""Decoding a packed weight by whatever is there: a C library on a CPU, a Triton kernel on CUDA, torch anywhere.

All give the same bits; the first two are used only once they have given torch's for a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hubkit.tensors.fourbit import decode_c as compiled
from hubkit.tensors.fourbit import decode_triton as nf4_triton
from hubkit.tensors.fourbit.nf4 import PackedWeight, decoded_by_torch


def dequantize(packed: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that `packed` stands for.

    Args:
        dtype: of the result; the packed weight's own by default. Products are float32, rounded once.
    """
    dtype = dtype or packed.dtype
    if torch.compiler.is_compiling():
        made: Tensor = _decode(
            packed.codes,
            packed.absmax,
            packed.levels,
            packed.nested_absmax,
            packed.nested_map,
            packed.shape,
            packed.block,
            packed.nested_block,
            packed.shift,
            dtype,
        )
        return made
    decoder = compiled.decoder_for(packed, dtype) or nf4_triton.decoder_for(packed, dtype) or decoded_by_torch
    return decoder(packed, dtype)


@torch.library.custom_op(
    "hubkit::decode",
    mutates_args=(),
    schema="(Tensor codes, Tensor absmax, Tensor levels, Tensor? nested_absmax, Tensor? nested_map, SymInt[] shape,"
    " int block, int nested_block, Tensor offset, ScalarType dtype) -> Tensor",
)
def _decode(
    codes: Tensor,
    absmax: Tensor,
    levels: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    shape: tuple[int, ...],
    block: int,
    nested_block: int,
    offset: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize` as one operation, which a compiler leaves as it is: what it makes of lookups itself is slow."""
    kind = ("nf4", block, nested_absmax, nested_map, nested_block, float(offset))
    return dequantize(PackedWeight(codes, absmax, levels, tuple(shape), dtype, *kind))


@_decode.register_fake
def _like_decoded(codes: Tensor, *rest: Any) -> Tensor:
    """Shape and dtype of what `_decode` gives, for the compiler."""
    made: Tensor = codes.new_empty(rest[4], dtype=rest[-1])
    return made
