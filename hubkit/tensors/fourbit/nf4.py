"""NF4 with double quantization (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, §3), in torch alone.

A weight is cut into blocks of 64 values in row-major order. Each block keeps the largest magnitude of its values
(absmax); each value becomes the index of the nearest of 16 levels times absmax. Two indices share a byte, the first in
the high half. The absmax are themselves stored in 8 bits: their mean is subtracted, and blocks of 256 are quantized
against the signed dynamic map (https://arxiv.org/abs/1511.04561). 4.127 bits per value.

Bits are those of bitsandbytes 0.50 on a CPU: codes, statistics and decoded values. What it writes is read here
(any of its block sizes and 4-bit types, nested or not), and the other way round.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hubkit.errors import HubkitError

CODEC = "nf4/64/double"
"""What this module writes, as manifests name it: 4-bit type, block size, and how absmax is stored."""
BLOCK, NESTED = 64, 256
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
STATE = "quant_state.bitsandbytes__"
"""Key, below a weight's name, of the JSON that says how the weight is packed; the 4-bit type follows."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_TYPES = ("nf4", "fp4")
_BINS = 32  # per unit: finer than the smallest distance between two thresholds
_CHUNK = {"cpu": 1 << 18}  # values at a time: two buffers of 1 MB stay in the cache
_CHUNK_ELSEWHERE = 1 << 24
_LANES = 8  # rows of a gather, which runs in parallel over rows only


@dataclass(frozen=True)
class PackedWeight:
    """One packed weight.

    Args:
        codes: (bytes, 1) uint8, two codes in a byte.
        absmax: (blocks,): uint8 indices of `nested_map` where `nested_absmax` is given, else float32.
        levels: (16,) float32.
        shape: of the weight, (out, in).
        dtype: of the weight before it was packed, and after it is decoded.
        kind: 4-bit type.
        block: values that share one absmax.
        nested_absmax: (groups,) float32.
        nested_map: (256,) float32.
        nested_block: absmax that share one value of `nested_absmax`.
        offset: the mean of the absmax.
    """

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "nf4"
    block: int = BLOCK
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    nested_block: int = NESTED
    offset: float = 0.0
    shift: Tensor = field(init=False, repr=False, compare=False)
    """`offset` as torch.compile may see it: of numbers it would make a program each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", torch.tensor(self.offset, dtype=torch.float64, device="cpu"))

    @property
    def codec(self) -> str:
        """How it is packed, in the words of manifests."""
        return f"{self.kind}/{self.block}/{'single' if self.nested_absmax is None else 'double'}"

    def tensors(self) -> dict[str, Tensor]:
        """Key below the weight's name (``""`` for the codes) -> tensor, as bitsandbytes stores them."""
        found = {"": self.codes, "absmax": self.absmax, "quant_map": self.levels}
        facts: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested_absmax is not None and self.nested_map is not None:
            found |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_map}
            facts |= {"nested_blocksize": self.nested_block, "nested_dtype": "float32", "nested_offset": self.offset}
        found[STATE + self.kind] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        return found


def quantize(weight: Tensor) -> PackedWeight:
    """Packs a weight.

    Args:
        weight: any shape; float32, bfloat16 or float16 (float64 goes through float32).

    Raises:
        HubkitError: ``HK-NAN`` for a weight that is not finite, ``HK-DTYPE`` for one that is not floating.
    """
    if weight.dtype not in _DTYPES.values():
        raise HubkitError("HK-DTYPE", f"weights of {weight.dtype} cannot be quantized", want=", ".join(_DTYPES))
    flat = weight.detach().reshape(-1)
    flat = flat.float() if flat.dtype == torch.float64 else flat
    count, device = flat.numel(), flat.device
    absmax = torch.empty(-(-count // BLOCK), device=device)
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
    whole, chunk = count - count % BLOCK, _chunk(device)
    for start in range(0, whole, chunk):
        part = slice(start, min(start + chunk, whole))
        maxima = absmax[start // BLOCK : part.stop // BLOCK]
        scaled = _scaled(flat[part], maxima)
        _require_finite(maxima)
        codes[start // 2 : part.stop // 2] = _codes(scaled)
    if whole < count:  # the last block is shorter; bitsandbytes divides there
        rest = flat[whole:].float()
        absmax[-1] = rest.abs().max().clamp(min=1e-38)
        _require_finite(absmax[-1:])
        rest = (rest / absmax[-1]).clamp(-1, 1)
        codes[whole // 2 :] = _codes(torch.nn.functional.pad(rest, (0, count % 2)))
    # on the CPU, whose order of summing is one: the mean is part of every value, and bits do not depend on the device
    offset = absmax.cpu().mean().item() if count else 0.0
    indices, nested = _quantize_statistics(absmax - offset)
    return PackedWeight(
        codes.unsqueeze(1),
        indices,
        torch.tensor(LEVELS, device=device),
        tuple(weight.shape),
        weight.dtype,
        nested_absmax=nested,
        nested_map=dynamic_map().to(device, copy=True),
        offset=offset,
    )


def decoded_by_torch(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight that `packed` stands for, in torch alone, on any device; products are float32, rounded once."""
    scales, count, device = absmax_of(packed), math.prod(packed.shape), packed.codes.device
    codes = packed.codes.view(torch.uint8).view(-1)
    result = torch.empty(2 * codes.numel(), dtype=dtype, device=device)
    whole, chunk = count - count % packed.block, _chunk(device)
    pairs = _pairs(packed.levels)
    buffer = torch.empty(min(chunk, whole) // 2, dtype=torch.int64, device=device)
    found = torch.empty_like(buffer)
    for start in range(0, whole, chunk):
        stop = min(start + chunk, whole)
        indices = buffer[: (stop - start) // 2].copy_(codes[start // 2 : stop // 2])
        values = _look_up(pairs, indices, found[: len(indices)]).view(torch.float32).view(-1, packed.block)
        values.mul_(scales[start // packed.block : stop // packed.block].unsqueeze(1))
        result[start:stop] = values.view(-1)
    if whole < count:
        rest = _look_up(pairs, codes[whole // 2 :].long()).view(torch.float32)
        result[whole:] = rest.mul_(scales[-1])
    return result[:count].view(packed.shape)


def packed_on(packed: PackedWeight, device: torch.device) -> PackedWeight:
    """`packed` with its tensors on `device`."""
    there: dict[str, Any] = {name: t.to(device) for name, t in vars(packed).items() if isinstance(t, Tensor)}
    del there["shift"]
    return replace(packed, **there)


def absmax_of(packed: PackedWeight) -> Tensor:
    """(blocks,) float32: the absmax of every block, decoded."""
    if packed.nested_absmax is None or packed.nested_map is None:
        return packed.absmax.float()
    values = packed.nested_map.index_select(0, packed.absmax.int())
    values.mul_(packed.nested_absmax.repeat_interleave(packed.nested_block)[: len(values)])
    return values.add_(packed.offset)


def unpacked(tensors: Mapping[str, Tensor], where: str) -> PackedWeight:
    """The packed weight that bitsandbytes, or `PackedWeight.tensors`, stored.

    Args:
        tensors: as `PackedWeight.tensors` gives them.
        where: name of the weight, for messages.

    Raises:
        HubkitError: ``HK-QUANT-STATE`` when a statistic is missing, or does not fit the rest.
    """
    key = next((STATE + kind for kind in _TYPES if STATE + kind in tensors), STATE + _TYPES[0])
    facts = read_state(tensors[key], where) if key in tensors else None
    needed = {"absmax", "quant_map", key}
    if facts is None or facts.nested_map is not None:
        needed |= {"nested_absmax", "nested_quant_map"}
    missing = sorted(needed - tensors.keys())
    if missing or facts is None:
        raise _broken(where, "the packed weight is not complete", [f"missing: {where}.{name}" for name in missing])
    made = replace(facts, codes=tensors[""], absmax=tensors["absmax"], levels=tensors["quant_map"])
    if facts.nested_map is not None:
        made = replace(made, nested_absmax=tensors["nested_absmax"], nested_map=tensors["nested_quant_map"])
    _require_fitting(made, where)
    return made


def read_state(state: Tensor, where: str) -> PackedWeight:
    """The facts of a packed weight, without its values: `state` holds their JSON.

    Raises:
        HubkitError: ``HK-QUANT-STATE``.
    """
    nothing = torch.empty(0)
    try:
        facts = json.loads(bytes(state.tolist()))
        nested = "nested_blocksize" in facts
        made = PackedWeight(
            nothing,
            nothing,
            nothing,
            tuple(int(size) for size in facts["shape"]),
            _DTYPES[facts["dtype"]],
            facts["quant_type"],
            int(facts["blocksize"]),
            nothing if nested else None,
            nothing if nested else None,
            int(facts.get("nested_blocksize", NESTED)),
            float(facts.get("nested_offset", 0.0)),
        )
        known = made.kind in _TYPES and made.block >= 2 and made.block % 2 == 0 and made.nested_block > 0
        if not known or not math.isfinite(made.offset) or min(made.shape, default=-1) < 0:
            raise ValueError(facts)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _broken(where, "the packed weight does not say how it is packed", f"{type(e).__name__}: {e}") from None
    return made


def _require_fitting(packed: PackedWeight, where: str) -> None:
    count = math.prod(packed.shape)
    blocks = -(-count // packed.block)
    nested = packed.nested_absmax is not None
    wants = [
        ("codes", packed.codes.view(-1).view(torch.uint8), -(-count // 2), torch.uint8),
        ("absmax", packed.absmax, blocks, torch.uint8 if nested else torch.float32),
        ("quant_map", packed.levels, 16, torch.float32),
    ]
    if packed.nested_absmax is not None and packed.nested_map is not None:
        wants.append(("nested_absmax", packed.nested_absmax, -(-blocks // packed.nested_block), torch.float32))
        wants.append(("nested_quant_map", packed.nested_map, 256, torch.float32))
    wrong = [
        f"{name}: {have.numel()} {have.dtype}, want {size} {dtype}"
        for name, have, size, dtype in wants
        if have.numel() != size or have.dtype != dtype
    ]
    if wrong:
        raise _broken(where, f"the packed weight does not hold {tuple(packed.shape)} values", wrong)


def _broken(where: str, what: str, have: str | list[str]) -> HubkitError:
    fix = "fetch the checkpoint again, or quantize the original one"
    return HubkitError("HK-QUANT-STATE", what, where=where, have=have, fix=fix)


def _require_finite(maxima: Tensor) -> None:
    if not torch.isfinite(maxima).all():
        raise HubkitError("HK-NAN", "a weight that holds NaN or infinity cannot be quantized")


def _scaled(values: Tensor, maxima: Tensor) -> Tensor:
    """`values` in blocks, divided by their absmax, which go to `maxima`: bitsandbytes multiplies by the reciprocal."""
    blocks = values.view(-1, BLOCK).to(torch.float32, copy=True)
    torch.amax(blocks.abs(), 1, out=maxima)
    return blocks.mul_((1.0 / maxima.clamp(min=1e-38)).unsqueeze(1)).view(-1)


def _codes(values: Tensor) -> Tensor:
    """Values in [-1, 1] as packed codes.

    A value is above as many thresholds as lie below its bin of 1/32, and above the one inside the bin or not.
    """
    below, inside = _bins(values.device)
    bins = (values + 1).mul_(_BINS).to(torch.int64)
    codes = _look_up(below, bins)
    codes += (values > _look_up(inside, bins)).view(torch.uint8)
    pairs = codes.view(torch.int16)  # little-endian: the first code is the low byte
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)


def _look_up(table: Tensor, indices: Tensor, out: Tensor | None = None) -> Tensor:
    """``table[indices]``, one dimension each: as a gather of several rows, which torch runs on all cores."""
    lanes = _LANES if indices.numel() % _LANES == 0 else 1
    rows = None if out is None else out.view(lanes, -1)
    return torch.gather(table.expand(lanes, -1), 1, indices.view(lanes, -1), out=rows).view(-1)


def _pairs(levels: Tensor) -> Tensor:
    """(256,): for each byte its two levels, as one 64-bit number."""
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    return pairs.contiguous().view(torch.int64).view(-1)


@functools.cache
def _bins(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each bin of 1/32 from -1: the thresholds below it, and the one inside it (2 where there is none)."""
    levels = torch.tensor(LEVELS)
    thresholds = (levels[1:] + levels[:-1]) / 2
    starts = torch.arange(2 * _BINS + 2) / _BINS - 1
    below = torch.searchsorted(thresholds, starts)
    inside = torch.cat([thresholds, torch.tensor([2.0])])[below]
    return below.to(torch.uint8).to(device), inside.to(device)


@functools.cache
def dynamic_map() -> Tensor:
    """(256,) float32, ascending: the signed dynamic data type of 8 bits, 7 decades."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        scale = 10 ** (exponent - 6)
        values += (scale * means).tolist() + (-scale * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def _nearest() -> Tensor:
    """(65536,) uint8: the nearest entry of the dynamic map for each point of a grid over [-1, 1]."""
    table = dynamic_map()
    thresholds = (table[:-1] + table[1:]) * 0.5
    grid = torch.arange(65536, dtype=torch.float32) * 2 / 65535 - 1
    return torch.searchsorted(thresholds, grid).to(torch.uint8)


def _quantize_statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into the dynamic map and the absmax of each group; on the grid that bitsandbytes looks them up by."""
    groups = -(-len(values) // NESTED)
    padded = torch.nn.functional.pad(values, (0, groups * NESTED - len(values))).view(groups, NESTED)
    maxima = padded.abs().amax(1) if groups else values.new_empty(0)
    scaled = (padded * (1.0 / maxima).unsqueeze(1)).clamp(-1, 1)
    # one fused multiply-add there, rounded once: exact in float64
    places = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().nan_to_num(0).int()
    indices = _nearest().to(values.device)[places].masked_fill_((maxima == 0).unsqueeze(1), 0)
    return indices.view(-1)[: len(values)].contiguous(), maxima


def _chunk(device: torch.device) -> int:
    return _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
