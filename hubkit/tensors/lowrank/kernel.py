"""A step of decoding whose rows have low-rank factors of their own, by a few lines of C where a compiler is found.

Reading the factors is all the work there is: torch's batched products want them once per row, in fp32.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hubkit.tensors.native import built

_SOURCE = Path(__file__).with_name("rows.c")
STRIP = 64
"""Outputs that the kernel computes together; as in rows.c."""


class RowKernel:
    """The compiled library; all tensors are contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._down, self._up = library.hubkit_down, library.hubkit_up
        self._down.argtypes, self._down.restype = [pointer] * 4 + [number] * 3 + [ctypes.c_int32], None
        self._up.argtypes, self._up.restype = [pointer] * 5 + [number] * 4 + [ctypes.c_int32], None

    def down(self, x: Tensor, down: Tensor, mix: Tensor) -> Tensor:
        """x (rows, in) bf16, down (mixes, R, in) bf16, the mix of each row (rows,), -1 for none -> (rows, R) fp32."""
        rows, inner, rank = x.shape[0], x.shape[1], down.shape[1]
        low = torch.empty(rows, rank)
        self._down(
            x.data_ptr(), down.data_ptr(), mix.data_ptr(), low.data_ptr(), rows, inner, rank, torch.get_num_threads()
        )
        return low

    def add(self, y: Tensor, low: Tensor, first: int, up: Tensor, scale: Tensor, mix: Tensor) -> None:
        """y (rows, out) bf16 += what `tiled` up factors make of low[:, first : first + r], scaled (mixes,)."""
        rank, out = up.shape[2], y.shape[1]
        self._up(
            low.data_ptr() + 4 * first,
            up.data_ptr(),
            scale.data_ptr(),
            mix.data_ptr(),
            y.data_ptr(),
            y.shape[0],
            low.shape[1],
            rank,
            out,
            torch.get_num_threads(),
        )


def tiled(up: Tensor) -> Tensor:
    """Up factors (mixes, r, out) as the kernel reads them: (mixes, strips, r, 64) bf16, zeros behind the last."""
    mixes, rank, out = up.shape
    padded = F.pad(up.to(torch.bfloat16), (0, -out % STRIP))
    return padded.view(mixes, rank, -1, STRIP).transpose(1, 2).contiguous()


@functools.cache
def row_kernel() -> RowKernel | None:
    """The kernel of this process, compiled if need be; None where torch has to do."""
    return built(_SOURCE, RowKernel, _agrees)


def _agrees(kernel: RowKernel) -> bool:
    """Whether it computes what torch does, within the rounding of bf16, on sizes that no vector divides."""
    generator = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(size, generator=generator).bfloat16() for size in ((3, 37), (2, 5, 37), (2, 3, 133)))
    mix, scale, y = torch.tensor([1, -1, 0]), torch.tensor([0.5, -2.0]), torch.ones(3, 133).bfloat16()
    low = kernel.down(x, down, mix)
    kernel.add(y, low, 2, tiled(up), scale, mix)
    want = torch.ones(3, 133)
    for row in (0, 2):
        at = int(mix[row])
        want[row] += scale[at] * (x[row].float() @ down[at, 2:].float().t() @ up[at].float())
    return bool((y.float() - want).abs().max() <= 2**-8 * want.abs().max())
