"""Decoding packed weights on a CUDA device in one Triton kernel: torch's bits, made to run at the speed of memory.

A value costs 1/2 byte of codes, 1/64 of absmax and 1/4096 of nested absmax to read, and 2 bytes (bfloat16) to write:
2.516 bytes. That bounds a device of 4.8 TB/s (H200) to 1.9e12 values a second, a weight of 4096 x 4096 to 9 µs;
3.35 TB/s (H100) gives 13 µs. float32 costs 4.516 bytes. Code for sm_90 has eleven instructions a value; at that bound
an H200 issues two thirds of what it can, so memory stays the limit.

Levels are looked up in their table of 64 bytes: one line of L1, each word in a bank of its own, so 32 lookups are one
access whatever the codes are. Choosing among 16 by arithmetic would take fifteen instructions a value instead of four.
`tl.gather` (shared memory) would take three, but came with Triton 3.3, whose compiler fails an assertion on it.

The kernel is used only once it has decoded a sample to the very bits of torch's route on that device. Wherever anything
is missing (triton, the C compiler its launcher needs, a device it knows) torch decodes; so it does under torch.compile,
where its lookups are fused with what comes next, and what is traced need know nothing of a kernel.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hubkit.tensors.fourbit.nf4 import LEVELS, PackedWeight, decoded_by_torch, dynamic_map
from hubkit.tensors.native import wanted

if TYPE_CHECKING:
    import triton.language as tl
else:
    tl = None  # until `_kernel` imports it: Triton looks names up among the globals of a kernel's module
RUNS = 512
"""Runs of a program: four for each of its 128 threads, so that four loads are under way at once."""
_RUN = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}  # values in 16 bytes, the widest store of a thread
_DEVICE = "cuda"
_lock = threading.Lock()
_agreed: dict[tuple[torch.device, torch.dtype, int, int, bool], bool] = {}


def decoder_for(packed: PackedWeight, dtype: torch.dtype) -> Callable[[PackedWeight, torch.dtype], Tensor] | None:
    """What decodes `packed` to `dtype`; None where torch has to.

    The first call for a device, dtype and form of packing compiles (seconds) and waits for the device; no other does.
    """
    device, count = packed.codes.device, math.prod(packed.shape)
    if torch.compiler.is_compiling() or device.type != _DEVICE or dtype not in _RUN or not count or not wanted():
        return None
    nested = packed.nested_absmax is not None and packed.nested_map is not None
    kinds = [(packed.absmax, torch.uint8 if nested else torch.float32), (packed.levels, torch.float32)]
    kinds += [(t, torch.float32) for t in (packed.nested_absmax, packed.nested_map) if t is not None]
    if type(packed.codes) is not Tensor or packed.block % 2:
        return None
    if any(type(t) is not Tensor or t.device != device or t.dtype != kind for t, kind in kinds):
        return None
    # what Triton compiles by; it specializes on multiples of 16, of values and of bytes
    form = (device, dtype, packed.block, packed.nested_block if nested else 0, count % 32 == 0)
    with _lock:
        if form not in _agreed:
            if torch.cuda.is_current_stream_capturing():  # a graph, during whose capture nothing may wait
                return None
            _agreed[form] = _agrees(*form)
        return decoded if _agreed[form] else None


def decoded(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, on the device of `packed`; nothing is waited for."""
    codes, count = packed.codes.view(torch.uint8).view(-1), math.prod(packed.shape)
    out = torch.empty(packed.shape, dtype=dtype, device=codes.device)
    absmax, levels, nested_absmax, nested_map = (
        None if t is None else t.contiguous()
        for t in (packed.absmax, packed.levels, packed.nested_absmax, packed.nested_map)
    )
    nested = nested_absmax is not None and nested_map is not None
    run = math.gcd(_RUN[dtype], packed.block)  # values that have one absmax
    with torch.cuda.device(codes.get_device()):  # Triton launches on the current one
        _kernel()[(-(-count // (RUNS * run)),)](
            codes,
            absmax,
            levels,
            nested_absmax if nested else levels,
            nested_map if nested else levels,
            out,
            packed.offset,
            -(-count // 2),
            count,
            BLOCK=packed.block,
            NESTED=packed.nested_block if nested else 0,
            RUN=run,
            RUNS=RUNS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


@functools.cache
def _kernel() -> Any:
    """`_decode_tile`, to be launched.

    Raises:
        ImportError: without triton.
    """
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_decode_tile)


def _decode_tile(
    codes: tl.tensor,
    absmax: tl.tensor,
    levels: tl.tensor,
    nested_absmax: tl.tensor,
    nested_map: tl.tensor,
    out: tl.tensor,
    offset: tl.tensor,
    size: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
) -> None:
    """One program decodes RUNS runs of RUN values; a thread stores a run at once, its neighbour the next one.

    Each operation rounds once, to nearest even, as torch's do: no product may be fused with the sum after it
    (``enable_fp_fusion=False`` at the launch; Triton 3.0 fuses by default, 3.9 does not).

    Args:
        codes: (size,) uint8, the first of two codes in the high half.
        absmax: (blocks,) uint8 with NESTED, else float32.
        levels, nested_absmax, nested_map: float32, as in `PackedWeight`; the last two are not read without NESTED.
        out: (count,) values.
        offset: float32.
        BLOCK: values that share one absmax.
        NESTED: absmax that share one nested absmax; 0 where absmax are not packed.
        RUN: a divisor of BLOCK.
    """
    program = tl.program_id(0).to(tl.int64)  # what is counted from a program's first value fits 32 bits
    start, start_byte = program * (RUNS * RUN), program * (RUNS * RUN // 2)
    run = tl.arange(0, RUNS)[:, None]
    value = run * RUN + tl.arange(0, RUN)[None, :]
    byte = run * (RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    values_left = tl.minimum(count - start, RUNS * RUN).to(tl.int32)
    bytes_left = tl.minimum(size - start_byte, RUNS * RUN // 2).to(tl.int32)
    pairs = tl.load(codes + start_byte + byte, mask=byte < bytes_left, other=0).to(tl.int32)
    # (RUNS, 1): one absmax for a run
    first, inside = start // BLOCK, run * RUN < values_left
    block = ((start % BLOCK).to(tl.int32) + run * RUN) // BLOCK
    scale = tl.load(absmax + first + block, mask=inside, other=0)
    if NESTED:
        group = first // NESTED + ((first % NESTED).to(tl.int32) + block) // NESTED
        scale = tl.load(nested_map + scale.to(tl.int32)) * tl.load(nested_absmax + group, mask=inside, other=0)
        scale = scale + offset
    values = tl.join(tl.load(levels + (pairs >> 4)), tl.load(levels + (pairs & 15))).reshape(RUNS, RUN) * scale
    tl.store(out + start + value, values.to(out.dtype.element_ty), mask=value < values_left)


def _agrees(device: torch.device, dtype: torch.dtype, block: int, nested_block: int, even: bool) -> bool:
    """Whether `decoded` gives torch's bits for a sample: random codes, the last block short, subnormal values too."""
    count, generator = 32 * (2 * block + 501) - (not even), torch.Generator().manual_seed(0)
    blocks = -(-count // block)
    codes = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, generator=generator)
    scales = torch.rand(-(-blocks // nested_block) if nested_block else blocks, generator=generator)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    packed = PackedWeight(
        codes.to(device),
        absmax.to(device),
        torch.tensor(LEVELS, device=device),
        (count,),
        dtype,
        block=block,
        nested_absmax=scales.to(device),
        nested_map=dynamic_map().to(device),
        nested_block=nested_block,
        offset=0.7,
    )
    if not nested_block:
        wide = (10.0 ** (50 * scales - 41)).to(device)
        packed = replace(packed, absmax=wide, nested_absmax=None, nested_map=None)
    try:
        have = decoded(packed, dtype)
    except Exception:  # whatever triton, its compiler or the driver raise
        return False
    return torch.equal(have.view(torch.uint8), decoded_by_torch(packed, dtype).view(torch.uint8))
