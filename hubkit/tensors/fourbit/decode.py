"""Decoding a packed weight by whatever is there: a C library on a CPU, a Triton kernel on CUDA, torch anywhere.

All give the same bits; the first two are used only once they have given torch's for a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hubkit.tensors.fourbit import decode_c as compiled
from hubkit.tensors.fourbit import decode_triton as nf4_triton
from hubkit.tensors.fourbit.nf4 import Packed, decoded_by_torch


def dequantize(packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """The weight that `packed` stands for.

    Args:
        dtype: of the result; the packed weight's own by default. Products are float32, rounded once.
    """
    dtype = dtype or packed.dtype
    decoder = compiled.decoder_for(packed, dtype) or nf4_triton.decoder_for(packed, dtype) or decoded_by_torch
    return decoder(packed, dtype)
