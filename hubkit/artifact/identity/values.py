"""The digest of a tensor's values, the same for every dtype that holds them exactly.

A model is copied between dtypes without loss: transformers 4.57 loads a bf16 file as fp32, people publish fp32 copies
of fp16 models. So values are hashed in the first of bf16, fp16, fp32 that holds all values of the tensor. "Holds" is
decided on bit patterns by integer arithmetic, never by floating-point comparison: -0.0, subnormals, infinities and
every NaN payload give the same answer on every machine, whatever its rounding and flushing modes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[Any]

BLOCK: Final = 8 * 2**20
"""Bytes hashed at a time: long enough that threads seldom meet at the interpreter's lock."""


class _Format(NamedTuple):
    """An IEEE 754 binary format: bits of the exponent and of the stored mantissa."""

    exponent: int
    mantissa: int

    @property
    def top(self) -> int:
        """The exponent field of infinities and NaNs."""
        return (1 << self.exponent) - 1

    @property
    def bias(self) -> int:
        return self.top >> 1


_F64, _F32, _F16 = _Format(11, 52), _Format(8, 23), _Format(5, 10)


def values_digest(dtype: str, data: memoryview) -> tuple[str, str]:
    """The digest of one tensor's values.

    Args:
        dtype: the safetensors name of the dtype, e.g. ``F32``.
        data: the little-endian values, contiguous, row-major.

    Returns:
        The dtype they were hashed in: the first of ``BF16``, ``F16``, ``F32`` that holds all values of a floating
        tensor exactly, `dtype` itself for everything else; and ``sha256:<hex>`` of the little-endian values in it.
        Only both together identify the values: the same 16 bits mean one number in bf16 and another in fp16.
    """
    flat = data.cast("B")
    return digest_blocks(dtype, lambda: (flat[i : i + BLOCK] for i in range(0, len(flat), BLOCK)))


def digest_blocks(dtype: str, blocks: Callable[[], Iterable[memoryview]]) -> tuple[str, str]:
    """`values_digest` of values that arrive in blocks.

    Args:
        dtype: as for `values_digest`.
        blocks: gives the values from the beginning each time it is called, in blocks of whole values; a block is
            read before the next one is asked for, so one buffer may serve all. Called once more for every dtype that
            fits the first blocks and then does not.
    """
    for stored, narrow in _candidates(dtype):
        digest = _attempt(narrow, blocks())
        if digest is not None:
            return stored, digest
    raise AssertionError("every dtype holds its own values")


def _attempt(narrow: Callable[[memoryview], Any] | None, blocks: Iterable[memoryview]) -> str | None:
    digest = hashlib.sha256()
    for block in blocks:
        kept = block if narrow is None else narrow(block)
        if kept is None:
            return None
        digest.update(kept)
    return f"sha256:{digest.hexdigest()}"


def _candidates(dtype: str) -> Iterator[tuple[str, Callable[[memoryview], Any] | None]]:
    if dtype == "F16":
        yield "BF16", lambda block: _half_to_brain(_bits(block, "<u2"))
    if dtype == "F32":
        yield "BF16", lambda block: _single_to_brain(_bits(block, "<u4"))
        yield "F16", lambda block: _little(_narrow(_bits(block, "<u4"), _F32, _F16), "<u2")
    if dtype == "F64":
        yield "BF16", lambda block: _then(_double_to_single(block), _single_to_brain)
        yield "F16", lambda block: _then(_double_to_single(block), lambda bits: _narrow(bits, _F32, _F16), "<u2")
        yield "F32", lambda block: _little(_double_to_single(block), "<u4")
    yield dtype, None


def _bits(block: memoryview, kind: str) -> Any:
    import numpy as np

    return np.frombuffer(block, dtype=kind)


def _little(bits: Any, kind: str) -> Any:
    return None if bits is None else bits.astype(kind)


def _then(bits: Any, step: Callable[[Any], Any], kind: str = "<u2") -> Any:
    return None if bits is None else _little(step(bits), kind)


def _double_to_single(block: memoryview) -> Any:
    return _narrow(_bits(block, "<u8"), _F64, _F32)


def _single_to_brain(bits: Bits) -> Bits | None:
    # bf16 is the upper half of fp32: the lower halves decide
    import numpy as np

    if int(np.bitwise_or.reduce(bits)) & 0xFFFF:
        return None
    return (bits >> 16).astype("<u2")


def _half_to_brain(bits: Bits) -> Bits | None:
    brain, fits = _brains_of_halves()
    return brain[bits] if fits[bits].all() else None


@cache
def _brains_of_halves() -> tuple[Any, Any]:
    """For each of the 65,536 fp16 patterns: its bf16 pattern, and whether that is exact."""
    import numpy as np

    half = np.arange(1 << 16, dtype=np.uint32)
    sign, exponent, mantissa = half >> 15, (half >> 10) & 31, half & 1023
    # a subnormal m * 2**-24 becomes normal: its leading one goes, the exponent counts where it stood
    lead = np.maximum(np.frexp(mantissa.astype(np.float64))[1] - 1, 0).astype(np.uint32)
    subnormal = ((lead + 103) << 23) | ((mantissa << (23 - lead)) & 0x7FFFFF)
    normal = (np.where(exponent == 31, 255, exponent + 112) << 23) | (mantissa << 13)
    magnitude = np.where(exponent > 0, normal, np.where(mantissa > 0, subnormal, 0)).astype(np.uint32)
    single = (sign << 31) | magnitude
    return (single >> 16).astype("<u2"), (single & 0xFFFF) == 0


def _narrow(bits: Bits, wide: _Format, slim: _Format) -> Bits | None:
    """The same values in a format with fewer bits of both fields, or None when one of them is not exact there.

    A NaN is kept with the upper bits of its payload, and is exact when the lower ones are zero.
    """
    import numpy as np

    drop = wide.mantissa - slim.mantissa
    # necessary for all kinds of values, and a single fast pass: most tensors that do not fit end here
    if int(np.bitwise_or.reduce(bits)) & ((1 << drop) - 1):
        return None
    kind = bits.dtype.type
    sign = bits >> kind(wide.exponent + wide.mantissa)
    exponent = (bits >> kind(wide.mantissa)) & kind(wide.top)
    mantissa = bits & kind((1 << wide.mantissa) - 1)
    scaled = exponent.astype(np.int64) - (wide.bias - slim.bias)
    normal = (scaled >= 1) & (scaled < slim.top)
    special = exponent == wide.top
    zero = (exponent == 0) & (mantissa == 0)
    # below the smallest normal the leading one is written out and shifted right; it must not fall off the end
    shift = np.clip(drop + 1 - scaled, 0, wide.mantissa).astype(kind)
    full = mantissa | kind(1 << wide.mantissa)
    subnormal = (scaled < 1) & (exponent > 0) & (drop + 1 - scaled <= wide.mantissa)
    subnormal &= (full >> shift) << shift == full
    if not (normal | special | zero | subnormal).all():
        return None
    field = np.where(special, slim.top, np.where(normal, scaled, 0)).astype(kind)
    digits = np.where(subnormal, full >> shift, mantissa >> kind(drop))
    out: Bits = (sign << kind(slim.exponent + slim.mantissa)) | (field << kind(slim.mantissa)) | digits
    return out
