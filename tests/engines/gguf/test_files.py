"""A GGUF file is read as the package gguf reads it, and what is none is refused, wherever it breaks off."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from ggufs import gguf_of, write_gguf
from zoo import model_of

from hubkit.engines.gguf.base import open_gguf
from hubkit.engines.gguf.header import read_header
from hubkit.errors import HubkitError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in F16."""
    room = tmp_path_factory.mktemp("files")
    model_of("llama").save_pretrained(room / "base")
    return gguf_of(room / "base", room / "base.gguf", "F16")


def test_the_package_reads_the_same(whole: Path) -> None:
    header, reader = read_header(whole), gguf.GGUFReader(whole)
    assert [*header.tensors] == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(tensor.shape.tolist()[::-1])
        assert (info.type, info.start, info.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
    assert header.metadata["llama.block_count"] == reader.fields["llama.block_count"].contents()
    assert header.metadata["tokenizer.ggml.tokens"] == len(reader.fields["tokenizer.ggml.tokens"].contents())


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_rows_are_decoded_as_the_package_decodes_them(kind: str, tmp_path: Path) -> None:
    values = {"a.weight": torch.randn(6, 64), "b.weight": torch.randn(3, 4, 64)}
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    path = write_gguf(tmp_path / "x.gguf", "llama", values, config, kind)
    base, reader = open_gguf(path, "llama"), gguf.GGUFReader(path)
    for tensor in reader.tensors:
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "a.weight":
            assert np.array_equal(base.rows("a.weight", None, 2, 5).numpy(), want[2:5])
        else:
            assert np.array_equal(base.rows("b.weight", 2, 1, 4).numpy(), want[2, 1:4])


def refusal(path: Path) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        open_gguf(path, "llama")
    return caught.value


def test_a_file_that_breaks_off_anywhere(whole: Path, tmp_path: Path) -> None:
    data, cut = whole.read_bytes(), tmp_path / "cut.gguf"
    for size in (0, 3, 4, 7, 12, 23, 24, *random.Random(0).sample(range(25, len(data)), 60)):
        cut.write_bytes(data[:size])
        error = refusal(cut)
        assert error.code == "HK-GGUF", size
        assert error.fix


def met(path: Path) -> str:
    """The code of what a header is refused with; empty where it is read."""
    try:
        read_header(path)
    except HubkitError as error:
        return error.code
    return ""


def test_garbage(whole: Path, tmp_path: Path) -> None:
    """Bytes changed at random are read or refused; sizes from strangers take neither memory nor time."""
    data, path, chance = whole.read_bytes(), tmp_path / "garbage.gguf", random.Random(1)
    head = read_header(whole)
    limit = min(info.start for info in head.tensors.values())
    for _ in range(200):
        other = bytearray(data)
        for at in chance.sample(range(limit), 3):
            other[at] = chance.randrange(256)
        path.write_bytes(other)
        assert met(path) in ("", "HK-GGUF")
    for count in (1 << 31, 1 << 62, (1 << 64) - 1):
        path.write_bytes(data[:8] + struct.pack("<QQ", count, count) + data[24:])
        assert refusal(path).code == "HK-GGUF"
    path.write_bytes(random.Random(2).randbytes(4096))
    assert "does not begin with GGUF" in refusal(path).have[0]


def test_what_is_no_model(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    (tmp_path / "old.gguf").write_bytes(data[:4] + struct.pack("<I", 1) + data[8:])
    assert "version 1" in refusal(tmp_path / "old.gguf").have[0]
    (tmp_path / "big.gguf").write_bytes(data[:4] + struct.pack(">I", 3) + data[8:])
    assert refusal(tmp_path / "big.gguf").code == "HK-GGUF"
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert refusal(tmp_path / "part.gguf").fix == "join them first: llama-gguf-split --merge"
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert refusal(tmp_path / "adapter.gguf").have == ["adapter"]
    assert refusal(tmp_path / "nowhere.gguf").code == "HK-MISSING"
    assert refusal(tmp_path).code == "HK-MISSING"
