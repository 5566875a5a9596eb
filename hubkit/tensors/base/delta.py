"""What an adapter adds to one weight: `Delta`, kept as factors for as long as it can be, and the rule that applies it.

One rule serves weights in memory and weights streamed from files: the same tiles, the same accumulation, one cast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 22
"""Elements of one row tile: 16 MiB in fp32, which fits caches and bounds the memory of a streamed merge."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class Delta:
    """An addition to a weight of shape (out, in) and to its bias.

    Args:
        left: (out, R) or None.
        right: (R, in) or None; the low-rank addend is ``left @ right``.
        dense: (out, in) or None; a further addend.
        bias: (out,) or None.
        value: (out, in), what the weight is where this delta is added alone, for one that was made from it: in floating
            point W + (V - W) is not always V.
        bias_value: the same of the bias.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    value: Tensor | None = None
    bias_value: Tensor | None = None

    @classmethod
    def low_rank(cls, left: Tensor, right: Tensor) -> Delta:
        """The delta ``left @ right``; left (out, R), right (R, in)."""
        return cls(left=left, right=right)

    @classmethod
    def full(cls, weight: Tensor | None = None, bias: Tensor | None = None) -> Delta:
        """A delta given as a whole: weight (out, in), bias (out,)."""
        return cls(dense=weight, bias=bias)

    @property
    def is_low_rank(self) -> bool:
        """True when the factors say everything: no dense addend and no bias."""
        return self.dense is None and self.bias is None

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether this is a delta of a weight of shape (out, in): nothing is broadcast."""
        rank = 0 if self.left is None or self.left.dim() != 2 else self.left.shape[1]
        wants = (
            (self.left, (shape[0], rank)),
            (self.right, (rank, shape[1])),
            (self.dense, shape),
            (self.bias, shape[:1]),
        )
        whole = (self.left is None) == (self.right is None)
        return whole and all(tensor is None or tuple(tensor.shape) == want for tensor, want in wants)

    def describe(self) -> str:
        """The shapes, for messages."""
        fields = {"left": self.left, "right": self.right, "weight": self.dense, "bias": self.bias}
        return ", ".join(f"{name} {tuple(t.shape)}" for name, t in fields.items() if t is not None) or "nothing"

    def scaled(self, weight: float) -> Delta:
        """``weight`` times this delta."""
        if weight == 1.0:
            return self
        return Delta(
            None if self.left is None else self.left * weight,
            self.right,
            None if self.dense is None else self.dense * weight,
            None if self.bias is None else self.bias * weight,
        )

    def transposed(self) -> Delta:
        """The same change of the transposed weight; it has no bias."""
        return Delta(_t(self.right), _t(self.left), _t(self.dense), value=_t(self.value))

    def plus(self, other: Delta) -> Delta:
        """The sum of two deltas. Factors are concatenated: exact, rank R1 + R2."""
        return Delta(
            _join(self.left, other.left, 1),
            _join(self.right, other.right, 0),
            _add(self.dense, other.dense),
            _add(self.bias, other.bias),
        )

    def matrix(self) -> Tensor | None:
        """The weight's delta as one dense (out, in) matrix, or None when only the bias changes."""
        if self.left is None or self.right is None:
            return self.dense
        product = self.left @ self.right
        return product if self.dense is None else product + self.dense


def _join(a: Tensor | None, b: Tensor | None, dim: int) -> Tensor | None:
    return b if a is None else a if b is None else torch.cat([a, b], dim)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; every other weight is accumulated in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` where a vector register of any processor starts, copied there if need be.

    A product or a norm rounds differently elsewhere (MKL promises equal bits for equally aligned arrays alone), and
    files put tensors anywhere: what is merged live and what is merged from files would differ in their last bits.
    """
    return tensor if tensor.device.type != "cpu" or tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def tile_rows(columns: int) -> int:
    """How many rows of a weight, as it is stored, make one tile."""
    return max(1, TILE_ELEMENTS // max(1, columns))


class Tiles:
    """The rule of a weight's change, a tile of rows at a time: widened, added to, and cast by whoever takes the sum.

    Args:
        shape: of the stored weight: (out, in), or (in, out) when `transposed`.
        dtype: of the stored weight.
        delta: what to add; its factors and matrix are (out, in) always.
        device: where to compute.
        transposed: how the weight is stored.
        room: flat memory for one tile in the dtype of accumulation, used again and again; made here when None.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        delta: Delta,
        *,
        device: torch.device,
        transposed: bool,
        room: Tensor | None = None,
    ) -> None:
        wide = accumulation_dtype(dtype)
        given = (delta.left, delta.right, delta.dense, delta.value)
        left, right, dense, value = (None if t is None else t.to(device, wide) for t in given)
        if transposed:
            left, right, dense, value = _t(right), _t(left), _t(dense), _t(value)
        self._left, self._right, self._dense, self._value = left, right, dense, value
        self._shape, self._rows = shape, min(shape[0], tile_rows(shape[1]))
        count = self._rows * shape[1]
        fits = room is not None and room.dtype == wide and room.numel() >= count
        self._room = room if fits and room is not None else torch.empty(count, dtype=wide, device=device)

    def parts(self) -> Iterator[slice]:
        """The rows of each tile, in order."""
        for start in range(0, self._shape[0], max(1, self._rows)):
            yield slice(start, min(start + self._rows, self._shape[0]))

    def sum(self, part: slice, stored: Tensor) -> Tensor:
        """The changed rows `part`, accumulated wide; overwritten by the next call.

        Args:
            stored: those rows as they are stored.
        """
        # contiguous whatever the weight's own layout: a product's rounding depends on the layout it is accumulated in,
        # and weights streamed from files are row-major where live ones may be transposed views
        tile = self._room[: stored.numel()].view(stored.shape).copy_(stored)
        if self._value is not None:
            return tile.copy_(self._value[part])
        if self._dense is not None:
            tile += self._dense[part]
        if self._left is not None and self._right is not None:
            tile.addmm_(self._left[part], self._right)
        return tile


def apply_weight(weight: Tensor, delta: Delta, *, transposed: bool, dtype: torch.dtype | None = None) -> Tensor:
    """`weight` plus `delta`, as a new tensor.

    Args:
        weight: the stored weight, (out, in), or (in, out) when `transposed`.
        delta: what to add; its factors and matrix are (out, in) always.
        dtype: dtype of the result; the stored one by default. One cast, at the end.
    """
    result = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device)
    shape = (weight.shape[0], weight.shape[1])
    tiles = Tiles(shape, weight.dtype, delta, device=weight.device, transposed=transposed)
    for part in tiles.parts():
        result[part] = tiles.sum(part, weight[part])
    return result


def apply_bias(bias: Tensor, delta: Delta, *, dtype: torch.dtype | None = None) -> Tensor:
    """`bias` plus the delta's bias, accumulated wide and cast once."""
    if delta.bias_value is not None:
        return delta.bias_value.to(bias.device, dtype or bias.dtype)
    wide = accumulation_dtype(bias.dtype)
    change = torch.zeros_like(bias, dtype=wide) if delta.bias is None else delta.bias.to(bias.device, wide)
    return (bias.to(wide) + change).to(dtype or bias.dtype)


def _t(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.t()
