"""Compiled decoding: torch's bits whatever the shape, built once, and never in the way where it cannot be had."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hubkit.tensors import native
from hubkit.tensors.fourbit import decode_c as compiled
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.nf4 import LEVELS, PackedWeight, decoded_by_torch, quantize

CC = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(CC is None, reason="no C compiler here")
SHAPES = ((2, 16384), (257, 65), (1, 20001), (129, 254))


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home for all tests of this file: what one of them compiled, the others load."""
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path_factory.getbasetemp() / "compiled-home"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    compiled._decoder.cache_clear()
    yield
    compiled._decoder.cache_clear()


def packed(shape: tuple[int, int], block: int = 64, nested: bool = True) -> PackedWeight:
    """Random codes and statistics, of any block size; ties to even come often, and absmax of 0, infinity and NaN."""
    generator = torch.Generator().manual_seed(7)
    count = shape[0] * shape[1]
    blocks = -(-count // block)
    codes = torch.randint(0, 256, (-(-count // 2), 1), dtype=torch.uint8, generator=generator)
    if nested:
        return replace(
            quantize(torch.randn(shape, generator=generator)),
            codes=codes,
            block=block,
            nested_block=96,
            absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
            nested_absmax=torch.rand(-(-blocks // 96), generator=generator),
            offset=0.1234567890123,
        )
    absmax = torch.randn(blocks, generator=generator).exp()
    absmax[:4] = torch.tensor([0.0, float("inf"), float("nan"), 3.4e38])
    absmax[4:40] = 1 + torch.arange(36)[: len(absmax[4:40])] / 128
    return PackedWeight(codes, absmax, torch.tensor(LEVELS), shape, torch.float32, block=block)


@needs_compiler
@pytest.mark.parametrize("compiler", ["", " -DHUBKIT_PLAIN"], ids=["vectors", "plain"])
def test_every_bit_is_torchs(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler:
        monkeypatch.setenv("CC", f"{CC}{compiler}")
        monkeypatch.setenv("HUBKIT_HOME", str(tmp_path))
    for shape in SHAPES:
        for block in (2, 32, 64, 4096):
            for nested in (True, False):
                weight = packed(shape, block, nested)
                for dtype in (torch.bfloat16, torch.float32):
                    assert compiled.decoder_for(weight, dtype) is not None
                    have, want = dequantize(weight, dtype), decoded_by_torch(weight, dtype)
                    assert have.dtype == dtype
                    known = ~want.isnan()
                    assert torch.equal(have.isnan(), ~known)
                    assert torch.equal(have[known], want[known]), (shape, block, nested, dtype)


@needs_compiler
def test_threads_decode_at_once() -> None:
    weight = packed((257, 650))
    want = decoded_by_torch(weight, torch.bfloat16)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: dequantize(weight, torch.bfloat16), range(32))
        assert all(torch.equal(have, want) for have in found)


@needs_compiler
def test_it_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled._decoder() is not None
    compiled._decoder.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert compiled._decoder() is not None


@needs_compiler
@pytest.mark.parametrize("fault", ["other bits", "no C", "no function"])
def test_a_library_that_is_not_right_is_not_used(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = compiled._SOURCE.read_text()
    text = {
        "other bits": source.replace("+ w->offset", "+ w->offset * 1.001f"),
        "no C": "int",
        "no function": source.replace("hubkit_decode", "other"),
    }
    (tmp_path / "nf4.c").write_text(text[fault])
    monkeypatch.setattr(compiled, "_SOURCE", tmp_path / "nf4.c")
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    weight = packed((257, 65))
    assert compiled.decoder_for(weight, torch.float32) is None
    assert torch.equal(dequantize(weight, torch.float32), decoded_by_torch(weight, torch.float32))
    assert not [name for name in os.listdir(tmp_path / "home" / "compiled") if not name.endswith(".so")]


def test_without_compiler_or_home_or_wish_torch_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed((257, 65))
    (tmp_path / "file").touch()
    for name, value in (("CC", "false"), ("CC", "/no/such/compiler"), ("HUBKIT_HOME", str(tmp_path / "file"))):
        with monkeypatch.context() as patch:
            patch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
            patch.setenv(name, value)
            compiled._decoder.cache_clear()
            assert compiled.decoder_for(weight, torch.float32) is None
    compiled._decoder.cache_clear()
    monkeypatch.setenv(native.SWITCH, "0")
    assert compiled.decoder_for(weight, torch.float32) is None


@needs_compiler
def test_a_library_of_another_user_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled._decoder() is not None
    path = next((Path(os.environ["HUBKIT_HOME"]) / "compiled").iterdir())
    compiled._decoder.cache_clear()
    other = os.stat_result((0, 0, 0, 0, os.getuid() + 1, 0, 0, 0, 0, 0))
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **k: other if self == path else real(self, **k))
    assert compiled._decoder() is None


def test_small_weights_and_other_devices_are_torchs() -> None:
    weight = packed((257, 65))
    assert compiled.decoder_for(quantize(torch.ones(4, 64)), torch.float32) is None
    assert compiled.decoder_for(weight, torch.float16) is None
    assert compiled.decoder_for(replace(weight, codes=weight.codes.to("meta")), torch.float32) is None
