"""Weights that lie in a base's files as codes with scales: found by their headers, decoded by their format's formula.

A weight is ``scale · (code - zero)``; formats differ in where the scale stands and how far it reaches:

- fp8 of DeepSeek, Qwen and transformers (``FineGrainedFP8Config``), fbgemm: ``weight`` in float8, ``weight_scale_inv``
  or ``weight_scale``, one for the tensor, for each row, or for each block of ``weight_block_size``;
- int8 of bitsandbytes: ``weight``, and ``SCB``, the largest value of each row, which the code 127 stands for;
- compressed-tensors: ``weight`` in float8 or int8 (``float-quantized``, ``int-quantized``, ``naive-quantized``), or
  ``weight_packed`` (``pack-quantized``: integers of 1 to 8 bits, one after the other in 32-bit words) and
  ``weight_shape``; ``weight_scale`` and ``weight_zero_point`` for the tensor, a row, a group of a row, or a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hubkit.artifact.identity.header import TensorInfo
from hubkit.errors import HubkitError
from hubkit.tensors.files.dtypes import DTYPE_NAMES
from hubkit.tensors.files.shards import ReadTensor

QUANTIZATION = "quantization_config"
"""Where a ``config.json`` says how its weights are quantized."""
PACKED = "weight_packed"
_SCALES = ("weight_scale_inv", "weight_scale", "SCB")
_BESIDE = (
    *_SCALES,
    *("weight_zero_point", "weight_shape", "weight_format", "activation_scale"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
"""What a layer's codes have beside them; none of it means anything beside a decoded weight."""
_CODES = ("F8_E4M3", "F8_E5M2", "I8")


@dataclass(frozen=True)
class Coded:
    """One weight that is stored as codes.

    Args:
        name: what it is called decoded: ``model.layers.0.mlp.up_proj.weight``.
        codes: name of the tensor of its codes.
        beside: names of what belongs to the codes alone.
        shape: its own.
        blocks: rows and columns that share a scale, as the config says, perhaps of other weights; shapes decide.
        bits: of a packed code; None where a code is a number of its tensor.
    """

    name: str
    codes: str
    beside: tuple[str, ...]
    shape: tuple[int, int]
    blocks: tuple[tuple[int, int], ...] = ()
    bits: int | None = None

    def decoded(self, read: ReadTensor) -> Tensor:
        """Its values, (out, in), in float32.

        Raises:
            HubkitError: ``HK-BASE-FORMAT`` where scale and codes do not fit; what reading raises.
        """
        found = {name.rpartition(".")[2]: read(name) for name in self.beside}
        if int(found.get("weight_format", torch.zeros(1)).max()) != 0:
            raise self._refusal("rows in the order of a GPU's matrix units")
        scale = next(found[name] for name in _SCALES if name in found)
        codes, zero = read(self.codes), found.get("weight_zero_point")
        if self.bits is not None:
            codes = unpacked(codes, self.bits, self.shape[1])
            if zero is not None and zero.dtype == torch.int32:
                zero = unpacked(zero.t(), self.bits, self.shape[0]).t()
        values, wide = codes.to(torch.float32), _numbers(scale)
        if "SCB" in found:
            wide = wide.reshape(-1, 1) / 127
        if zero is not None:
            values -= self._over(zero.to(torch.float32))
        return values.mul_(self._over(wide))

    def _over(self, scale: Tensor) -> Tensor:
        """`scale` so that it multiplies the codes: one number, or as many rows and columns as they have."""
        if scale.numel() == 1:
            return scale.reshape(())
        grid = (*scale.shape, 1)[:2]
        reach = next((b for b in self.blocks if self._grid(b) == grid), None) or self._shares(grid)
        if scale.dim() > 2 or reach is None:
            raise self._refusal(f"scales {tuple(scale.shape)} for a weight {self.shape}")
        wide = scale.reshape(grid).repeat_interleave(reach[0], 0)[: self.shape[0]]
        return wide if grid[1] == 1 else wide.repeat_interleave(reach[1], 1)[:, : self.shape[1]]

    def _grid(self, block: tuple[int, int]) -> tuple[int, int]:
        """How many blocks of that size there are, the last ones smaller."""
        return -(-self.shape[0] // block[0]), -(-self.shape[1] // block[1])

    def _shares(self, grid: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns that share one scale of `grid`, where they do so evenly."""
        if not all(grid) or self.shape[0] % grid[0] or self.shape[1] % grid[1]:
            return None
        return self.shape[0] // grid[0], self.shape[1] // grid[1]

    def _refusal(self, have: str) -> HubkitError:
        return HubkitError(
            "HK-BASE-FORMAT",
            "the codes of a weight do not fit its scales",
            where=self.codes,
            want="one scale for the tensor, a row, a group or a block",
            have=have,
            fix="the 16-bit base that it was made from",
        )


def coded_weights(
    headers: Mapping[str, TensorInfo], config: Mapping[str, Any], read: ReadTensor | None, source: str
) -> dict[str, Coded]:
    """The weights of a base that are stored as codes and can be decoded: name -> how.

    Args:
        headers: of all its files.
        config: its ``config.json``.
        read: reads a tensor: the shape of a packed weight stands in one of its own. None: only headers are at hand.
        source: the base, for messages.

    Raises:
        HubkitError: ``HK-BASE-NEEDED`` for packed weights where there is nothing to read from.
    """
    arguments = list(_arguments(config))
    blocks = tuple(block for one in arguments if (block := _block(one)) is not None)
    found: dict[str, Coded] = {}
    for name, info in headers.items():
        stem, _, last = name.rpartition(".")
        beside = tuple(f"{stem}.{one}" for one in _BESIDE if f"{stem}.{one}" in headers)
        if not any(one.endswith(_SCALES) for one in beside) or len(info.shape) != 2:
            continue
        if last == "weight" and info.dtype in _CODES:
            found[name] = Coded(name, name, beside, (info.shape[0], info.shape[1]), blocks)
        elif last == PACKED and info.dtype == "I32" and f"{stem}.weight_shape" in beside:
            if read is None:
                raise HubkitError(
                    "HK-BASE-NEEDED",
                    "the base's weights are packed: their shapes stand in its files only",
                    where=f"{source}: {name}",
                    fix="name the base's folder with --base",
                )
            shape = tuple(read(f"{stem}.weight_shape").tolist())
            given = {one.get("num_bits") for one in arguments} & set(range(1, 9))
            fit = [bits for bits in given if len(shape) == 2 and info.shape == (shape[0], -(-shape[1] * bits // 32))]
            if len(fit) == 1:
                weight = f"{stem}.weight"
                found[weight] = Coded(weight, name, beside, (shape[0], shape[1]), blocks, fit[0])
    return found


def decoded_headers(
    headers: Mapping[str, TensorInfo], coded: Iterable[Coded], dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """`headers` with the weights `coded` decoded to `dtype`: each in place of its codes, what is beside them gone."""
    listed = list(coded)
    at, gone = {one.codes: one for one in listed}, {name for one in listed for name in one.beside}
    found: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        one = at.get(name)
        if one is not None:
            size = one.shape[0] * one.shape[1] * dtype.itemsize
            found[one.name] = TensorInfo(one.name, DTYPE_NAMES[dtype], one.shape, 0, size)
        elif name not in gone:
            found[name] = info
    return found


def in_mxfp4(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The experts that gpt-oss stores in MXFP4, ``_blocks`` of 32 codes of 4 bits and ``_scales``: name -> their shape.

    Args:
        shapes: of all tensors of a base by their names.
    """
    return {
        name.removesuffix("_blocks"): (*shape[:-3], 32 * shape[-2], shape[-3])  # the model holds them turned
        for name, shape in shapes.items()
        if name.endswith("_blocks") and len(shape) == 4 and f"{name.removesuffix('_blocks')}_scales" in shapes
    }


def unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """The integers of `bits` bits that lie one after the other in rows of 32-bit `words`, lowest bits first.

    Args:
        words: (rows, ⌈columns · bits / 32⌉), int32.

    Returns:
        (rows, columns), int32, of -2^(bits-1) ... 2^(bits-1) - 1.
    """
    first = torch.arange(columns) * bits
    word, shift = first // 32, first % 32
    wide = words.to(torch.int64) & 0xFFFFFFFF
    following = (word + 1).clamp_(max=words.shape[1] - 1)  # what lies across two words ends in this one
    values = (wide[:, word] | (wide[:, following] << 32)) >> shift
    return ((values & ((1 << bits) - 1)) - (1 << (bits - 1))).to(torch.int32)


def _numbers(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are powers of two (``ue8m0``)."""
    return (scale.to(torch.float32) - 127).exp2() if scale.dtype == torch.uint8 else scale.to(torch.float32)


def _arguments(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the config says of how weights are quantized: once, or for each of several groups of modules."""
    facts = config.get(QUANTIZATION)
    if isinstance(facts, Mapping):
        yield facts
        groups = facts.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                yield weights


def _block(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    given = arguments.get("block_structure") or arguments.get("weight_block_size")
    if isinstance(given, list) and len(given) == 2 and all(isinstance(n, int) and n > 0 for n in given):
        return given[0], given[1]
    return None
