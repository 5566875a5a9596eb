"""Decoding in Triton: torch's bits whatever the shape, compiled as it has to be, and never in the way without triton.

Without a GPU the kernel runs in Triton's interpreter, and is compiled for one with a driver that only names it. Both
change triton for the whole process, so this file runs itself as a script: ``python test_decode_triton.py interpret``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from hubkit.tensors import native
from hubkit.tensors.fourbit import decode_triton as nf4_triton
from hubkit.tensors.fourbit.nf4 import LEVELS, PackedWeight, absmax_of, decoded_by_torch, dynamic_map, quantize

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COUNTS = (1, 2, 63, 4096, 4097, 12288, 20001, 16705)
"""A program decodes 4096 values at most: less than one, one, one and a value, several, odd counts."""
BLOCKS = (2, 12, 32, 64, 4096)
FP4 = [value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
KINDS = {"nf4": torch.tensor(LEVELS), "fp4": torch.tensor(FP4 + [-value for value in FP4])}
FAR = 1 << 31


def packed(count: int, block: int, nested: bool, kind: str = "nf4") -> PackedWeight:
    """Random codes and statistics: absmax of 0, subnormal ones, large ones, ones that make ties to even frequent."""
    generator = torch.Generator().manual_seed(count + block)
    blocks = -(-count // block)
    codes = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, generator=generator)
    made = PackedWeight(codes, codes, KINDS[kind], (count,), torch.float32, kind, block)
    if nested:
        absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
        scales = torch.rand(-(-blocks // 96), generator=generator)
        return replace(
            made, absmax=absmax, nested_absmax=scales, nested_map=dynamic_map(), nested_block=96, offset=0.1234567890123
        )
    absmax = 10.0 ** (60 * torch.rand(blocks, generator=generator) - 45)
    absmax[1:4] = torch.tensor([0.0, 1e-45, 3.4e38])[: len(absmax[1:4])]
    absmax[4:40] = 1 + torch.arange(36)[: len(absmax[4:40])] / 128
    return replace(made, absmax=absmax)


def cases() -> Iterator[tuple[str, PackedWeight]]:
    """Names and packed weights: made up ones, and what `quantize` makes."""
    for count in COUNTS:
        for block in BLOCKS:
            for nested in (True, False):
                kind = "fp4" if block == 32 else "nf4"
                yield f"{kind}/{block}/{nested}/{count}", packed(count, block, nested, kind)
    for shape in ((64, 64), (257, 65), (100, 36)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        weight[::3] = 0
        for factor in (1.0, 1e-3, 0.0, 1e-39):
            made = quantize(weight * factor)
            yield f"quantized/{shape}/{factor}", made
            yield f"single/{shape}/{factor}", replace(made, absmax=absmax_of(made), nested_absmax=None, nested_map=None)


def on(device: torch.device, weight: PackedWeight) -> PackedWeight:
    names = ("codes", "absmax", "levels", "nested_absmax", "nested_map")
    found = {name: getattr(weight, name) for name in names}
    moved: dict[str, Any] = {name: t.to(device) for name, t in found.items() if t is not None}
    return replace(weight, **moved)


def same(have: Tensor, want: Tensor) -> bool:
    """Whether shapes, dtypes and bits are equal: 0 is not -0."""
    alike = (have.shape, have.dtype) == (want.shape, want.dtype)
    return alike and torch.equal(have.view(-1).view(torch.uint8), want.view(-1).view(torch.uint8))


def wrong(decode: Callable[[PackedWeight, torch.dtype], Tensor], device: torch.device) -> tuple[list[str], int]:
    """The cases that `decode` gets wrong, and how many there are."""
    found, count = [], 0
    for name, made in cases():
        weight = on(device, made)
        for dtype in DTYPES:
            count += 1
            if not same(decode(weight, dtype), decoded_by_torch(weight, dtype)):
                found.append(f"{name}/{dtype}")
    return found, count


def far(device: torch.device) -> tuple[PackedWeight, PackedWeight]:
    """A weight of more than 2^31 values, of which only the last are anything, and these as a weight of their own."""
    tail = replace(packed(4096 + 13, 64, True), nested_block=256)
    whole = replace(
        tail,
        shape=(FAR + tail.shape[0],),
        codes=torch.empty(FAR // 2 + len(tail.codes), dtype=torch.uint8, device=device),
        absmax=torch.empty(FAR // 64 + len(tail.absmax), dtype=torch.uint8, device=device),
        nested_absmax=torch.empty(FAR // 64 // 256 + 1, device=device),
    )
    for name in ("codes", "absmax", "nested_absmax"):
        part = getattr(tail, name).flatten()
        getattr(whole, name)[-len(part) :] = part.to(device)
    return replace(whole, levels=tail.levels.to(device), nested_map=dynamic_map().to(device)), on(device, tail)


def script(task: str, folder: Path, **environment: str) -> dict[str, Any]:
    """What this file prints last when it is run as a script."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(folder), **environment}
    done = subprocess.run([sys.executable, __file__, task], env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.slow
@needs_triton
def test_every_bit_is_torchs_in_the_interpreter(tmp_path: Path) -> None:
    answer = script("interpret", tmp_path, TRITON_INTERPRET="1")
    if "skip" in answer:
        pytest.skip(answer["skip"])
    assert answer["wrong"] == []
    assert answer["count"] == 3 * (len(COUNTS) * len(BLOCKS) * 2 + 24)
    assert answer["far"], "beyond 2^31 values"
    assert answer["agrees"] == [True] * 12
    assert not any(answer["disagrees"]), "a fused or truncating kernel would be found out"


@pytest.mark.slow
@needs_triton
def test_what_is_compiled_fuses_nothing_rounds_to_even_and_stores_16_bytes(tmp_path: Path) -> None:
    """Of the launch as `decoded` makes it, for sm_90, with counts of 32 and 64 bits."""
    answer = script("compile", tmp_path, TRITON_INTERPRET="0")
    assert len(answer) == 12
    for name, code in answer.items():
        assert ".target sm_90" in code
        assert "fma" not in code, name
        assert ".ftz" not in code, name
        assert "div.s64" not in code, name
        assert "rem.s64" not in code, name
        assert "st.global.v4.b32" in code, name
        rounding = {"bfloat16": "cvt.rn.bf16", "float16": "cvt.rn.f16", "float32": "mul"}[name.split("/")[0]]
        assert rounding in code, name
        for other in ("cvt.rz", "cvt.rm", "cvt.rp", "cvt.rna"):
            assert other not in code, name


def test_without_triton_it_imports_and_torch_decodes() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, hubkit
from hubkit.tensors.fourbit import decode_triton as nf4_triton
from hubkit.tensors.fourbit.nf4 import quantize
weight = quantize(torch.ones(65, 64))
assert nf4_triton.decoder_for(weight, torch.bfloat16) is None
nf4_triton._DEVICE, torch.cuda.is_current_stream_capturing = "cpu", lambda: False
assert nf4_triton.decoder_for(weight, torch.bfloat16) is None
assert len(nf4_triton._agreed) == 1
"""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU taken for a CUDA device, torch's route for a kernel, and no device known yet."""
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(nf4_triton, "_DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(nf4_triton, "_agreed", {})
    monkeypatch.setattr(nf4_triton, "decoded", decoded_by_torch)
    return monkeypatch


def test_a_sample_is_decoded_once_for_each_form(anywhere: pytest.MonkeyPatch) -> None:
    asked: list[PackedWeight] = []

    def decoded(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        asked.append(weight)
        return decoded_by_torch(weight, dtype)

    anywhere.setattr(nf4_triton, "decoded", decoded)
    for weight in (packed(4096, 64, True), packed(8192, 64, True), packed(8191, 64, True), packed(4096, 64, False)):
        for dtype in DTYPES * 2:
            assert nf4_triton.decoder_for(weight, dtype) is nf4_triton.decoded
    assert len(asked) == 9


def failing(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    raise RuntimeError("no compiler")


@pytest.mark.parametrize("decode", [lambda p, dtype: decoded_by_torch(p, dtype).nextafter(torch.ones(())), failing])
def test_a_kernel_that_gives_other_bits_or_raises_is_not_used(decode: Any, anywhere: pytest.MonkeyPatch) -> None:
    anywhere.setattr(nf4_triton, "decoded", decode)
    for _ in range(2):
        assert nf4_triton.decoder_for(packed(4096, 64, True), torch.float32) is None


def test_where_torch_decodes(anywhere: pytest.MonkeyPatch) -> None:
    weight, bf16 = packed(4096, 64, True), torch.bfloat16
    assert nf4_triton.decoder_for(weight, torch.float64) is None
    assert nf4_triton.decoder_for(packed(0, 64, True), bf16) is None
    assert nf4_triton.decoder_for(replace(weight, levels=weight.levels.double()), bf16) is None
    assert nf4_triton.decoder_for(replace(weight, levels=weight.levels.to("meta")), bf16) is None
    assert nf4_triton.decoder_for(replace(weight, codes=torch.nn.Parameter(weight.codes, False)), bf16) is None
    for switch in ((torch.compiler, "is_compiling"), (torch.cuda, "is_current_stream_capturing")):
        with anywhere.context() as patch:
            patch.setattr(*switch, lambda: True)
            assert nf4_triton.decoder_for(weight, bf16) is None
    assert nf4_triton.decoder_for(weight, bf16) is not None, "a capture settles nothing"
    anywhere.setenv(native.SWITCH, "0")
    assert nf4_triton.decoder_for(weight, bf16) is None
    anywhere.undo()
    assert nf4_triton.decoder_for(weight, bf16) is None


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_every_bit_is_torchs_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in DTYPES:
        assert nf4_triton.decoder_for(on(device, packed(4096, 64, True)), dtype) is not None, "triton cannot run here"
    assert wrong(nf4_triton.decoded, device)[0] == []


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_nothing_is_waited_for_on_a_gpu() -> None:
    weight = on(torch.device("cuda", torch.cuda.current_device()), packed(4096, 64, True))
    decode = nf4_triton.decoder_for(weight, torch.bfloat16)
    assert decode is not None
    want = decode(weight, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        have = decode(weight, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(weight, torch.bfloat16)
    graph.replay()
    assert same(have, want)
    assert same(captured, want)


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_every_bit_is_that_of_bitsandbytes_on_a_gpu(kind: str, nested: bool, dtype: torch.dtype) -> None:
    from hubkit.tensors.fourbit.nf4 import unpacked

    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(130, 256, dtype=dtype, device="cuda")
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
    made = unpacked({"": codes, **state.as_dict(packed=True)}, "w")
    assert same(nf4_triton.decoded(made, dtype), functional.dequantize_4bit(codes, state))


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_a_weight_beyond_32_bits_on_a_gpu() -> None:
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GB of free memory")
    whole, tail = far(torch.device("cuda", torch.cuda.current_device()))
    assert same(nf4_triton.decoded(whole, torch.float16)[FAR:], decoded_by_torch(tail, torch.float16))


class Kernel:
    """What stands in for the kernel: subscripted by a grid, it gives what is called instead of a launch."""

    def __init__(self, launcher: Callable[[tuple[int]], Callable[..., None]]) -> None:
        self._launcher = launcher

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self._launcher(grid)


def interpret() -> dict[str, Any]:
    """Everything in Triton's interpreter, with PTX's rounding: the interpreter truncates to bfloat16."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    if triton.__version__ < "3.2":
        return {"skip": "this interpreter reads no annotations that are strings"}
    builder, plain = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, to: Any) -> Any:
        if (source.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, source, to)
        values = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.int16)
        return interpreter.TensorHandle(values.numpy().view("uint16"), tl.bfloat16)

    disagrees = [nf4_triton._agrees(CPU, torch.bfloat16, 64, nested, True) for nested in (256, 0)]  # truncated
    builder.cast_impl = cast
    found, count = wrong(nf4_triton.decoded, CPU)
    forms = [(dtype, nested, even) for dtype in DTYPES for nested in (256, 0) for even in (True, False)]
    agrees = [nf4_triton._agrees(CPU, dtype, 64, nested, even) for dtype, nested, even in forms]
    add = builder.create_fadd

    def fused(self: Any, product: Any, offset: Any) -> Any:
        """A sum that takes a product before it is rounded, or as good as."""
        return add(self, interpreter.TensorHandle(numpy.nextafter(product.data, numpy.float32(9)), tl.float32), offset)

    builder.create_fadd = fused
    disagrees.append(nf4_triton._agrees(CPU, torch.float32, 64, 256, True))
    builder.create_fadd = add
    return {"wrong": found, "count": count, "agrees": agrees, "disagrees": disagrees, "far": far_is_right(builder)}


def far_is_right(builder: Any) -> bool:
    """Whether the last programs of a weight of more than 2^31 values decode them; the ones before are not run."""
    from triton.runtime import interpreter

    whole, tail = far(CPU)
    out = torch.empty(whole.shape, dtype=torch.float16)
    skipped, programs = FAR // 4096, -(-tail.shape[0] // 4096)
    launch = nf4_triton._kernel()

    def place(self: Any, x: int, y: int, z: int) -> None:
        self.grid_idx = (skipped + x, y, z)

    interpreter.GridExecutor._restore_args_dev = lambda *a: None  # copies storages onto themselves, all 6 GB
    builder.set_grid_idx = place
    kernel = nf4_triton._kernel
    nf4_triton._kernel = functools.cache(lambda: Kernel({(skipped + programs,): launch[(programs,)]}.__getitem__))
    real, torch.empty = torch.empty, lambda *a, **k: out
    try:
        nf4_triton.decoded(whole, torch.float16)
    finally:
        torch.empty, nf4_triton._kernel = real, kernel
    return same(out[FAR:], decoded_by_torch(tail, torch.float16))


def compiled() -> dict[str, str]:
    """PTX of the launches that `decoded` makes for whole tiles, by dtype, statistics and size of the count."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    triton.runtime.driver.set_active(driver)
    kernel = nf4_triton._kernel()
    found: dict[str, str] = {}

    def launched(grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            for size in (1, FAR):
                *rest, count = args
                rest[-1] *= size
                made = kernel.warmup(*rest, count * size, grid=grid, **options)
                name = f"{str(dtype).removeprefix('torch.')}/{nested}/{size}"
                found[name] = made.asm["ptx"]

        return launch

    nf4_triton._kernel = functools.cache(lambda: Kernel(launched))
    for dtype in DTYPES:
        for nested in (True, False):
            nf4_triton.decoded(packed(8192, 64, nested), dtype)
    return found


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compiled}[sys.argv[1]]()))
