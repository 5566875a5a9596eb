"""A base's files as one table; the streamed writer's files, and what happens when the disk does not take them."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hubkit.artifact.identity.header import DTYPE_BITS
from hubkit.errors import HubkitError
from hubkit.methods.suite import tiny_model
from hubkit.tensors.files.dtypes import DTYPE_NAMES
from hubkit.tensors.files.shards import Written, computed, open_shards, read_file, tensor_bytes, write_file

SHORT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TENSORS = {
    "a": torch.randn(7, 5),
    "b": torch.randn(3, 2, 2).to(torch.bfloat16),
    "c": torch.arange(6, dtype=torch.int64),
    "d": torch.zeros(0, 4, dtype=torch.float16),
    "e": torch.tensor(2.5, dtype=torch.float64),
    "f": torch.tensor([True, False, True]),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_model("llama").save_pretrained(folder, max_shard_size="8KB")  # type: ignore[operator]
    return folder


def written(tensors: dict[str, torch.Tensor]) -> list[Written]:
    return [computed(n, t.dtype, tuple(t.shape), t.detach) for n, t in tensors.items()]


def test_what_is_written_safetensors_reads(tmp_path: Path) -> None:
    digest = write_file(tmp_path / "x.safetensors", written(TENSORS))
    data = (tmp_path / "x.safetensors").read_bytes()
    assert digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    read = load_file(tmp_path / "x.safetensors")
    assert all(
        torch.equal(read[n], t) and read[n].dtype == t.dtype and read[n].shape == t.shape for n, t in TENSORS.items()
    )
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.is_floating_point()}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    read = read_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BITS) - set(DTYPE_NAMES.values())))
def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path, dtype: str) -> None:
    """safetensors writes such tensors, for other libraries: sixteen values of each."""
    size = 2 * DTYPE_BITS[dtype]
    body = json.dumps({"x": {"dtype": dtype, "shape": [16], "data_offsets": [0, size]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(body).to_bytes(8, "little") + body + bytes(size))
    with pytest.raises(HubkitError, match="HK-DTYPE") as caught:
        read_file(tmp_path / "x.safetensors")
    assert caught.value.have == [f"x: {dtype}"]


@pytest.mark.skipif(not SHORT.exists(), reason="needs Linux's sysfs")
def test_a_file_shorter_than_it_says_is_changing() -> None:
    """What sysfs holds is shorter than its size, like a file that is cut off between the two."""
    assert len(SHORT.read_bytes()) < SHORT.stat().st_size
    with pytest.raises(HubkitError, match="changes while it is read") as caught:
        read_file(SHORT)
    assert caught.value.code == "HK-SAFETENSORS"


def test_blocks_of_any_size_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = write_file(tmp_path / "x", written(TENSORS))
    monkeypatch.setattr("hubkit.tensors.files.shards.BLOCK", 3)
    assert write_file(tmp_path / "y", written(TENSORS)) == want
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_shards_are_one_table_and_copies_are_exact(base: Path, tmp_path: Path) -> None:
    shards = open_shards(base)
    assert len(shards.files()) > 2
    want = {n: t for file in shards.files() for n, t in load_file(base / file).items()}
    assert set(shards.headers) == set(want)
    assert all(torch.equal(shards.read(n), t) for n, t in want.items())
    first = shards.files()[0]
    names = [n for n, f in shards.file_of.items() if f == first]
    write_file(tmp_path / "again", [shards.copied(n) for n in names])
    assert all(torch.equal(t, want[n]) for n, t in load_file(tmp_path / "again").items())
    with pytest.raises(HubkitError, match="HK-BASE-TENSOR"):
        shards.read("nothing")


def test_strided_tensors_have_the_bytes_of_their_values() -> None:
    tensor = torch.randn(4, 6)
    assert bytes(tensor_bytes(tensor.t())) == numpy.ascontiguousarray(tensor.numpy().T).tobytes()
    assert bytes(tensor_bytes(torch.empty(0, 3))) == b""


def test_a_truncated_file_is_refused(base: Path) -> None:
    path = base / open_shards(base).files()[1]
    data = path.read_bytes()
    for size in (0, 4, 20, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(HubkitError, match="HK-SAFETENSORS"):
            open_shards(base)
    path.write_bytes(data)
    shards = open_shards(base)
    last = [n for n, f in shards.file_of.items() if f == path.name][-1]
    path.write_bytes(data[:-1])  # cut while it is being read
    with pytest.raises(HubkitError, match="the file is cut off"):
        shards.read(last)
    with pytest.raises(HubkitError, match="the file is cut off"):
        write_file(base / "x", [shards.copied(last)])


@pytest.mark.parametrize("fault", ["missing file", "wrong place", "no map", "extra", "traversal"])
def test_an_index_that_disagrees_with_its_files_is_refused(base: Path, fault: str) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    table: dict[str, str] = index["weight_map"]
    files = sorted(set(table.values()))
    name = next(n for n, f in table.items() if f == files[0])
    if fault == "missing file":
        (base / files[0]).unlink()
    elif fault == "wrong place":
        table[name] = files[1]
    elif fault == "no map":
        del index["weight_map"]
    elif fault == "extra":
        table["model.nothing.weight"] = files[0]
    else:
        table[name] = "../model.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(HubkitError) as caught:
        open_shards(base)
    assert caught.value.code == ("HK-NAME" if fault == "traversal" else "HK-BASE-FILES")


def test_the_files_are_those_that_identify_the_base(base: Path) -> None:
    """`model.safetensors` beside an index: transformers loads it, so it is fingerprinted, and so it is merged."""
    tensors = {n: t + 1 for f in open_shards(base).files() for n, t in load_file(base / f).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert open_shards(base).files() == ["model.safetensors"]


def test_a_folder_without_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HubkitError, match="HK-BASE-MISSING"):
        open_shards(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HubkitError, match="HK-BASE-FILES"):
        open_shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(HubkitError, match="HK-PICKLE"):
        open_shards(tmp_path)


class Full:
    """A file on a disk that is full after `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.closed = room, False

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *_: Any) -> None:
        self.closed = True


@pytest.mark.parametrize("room", [0, 1000, 30_000])
def test_a_full_disk_surfaces_and_the_thread_ends(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, made, before = Full(room), [], set(threading.enumerate())
    monkeypatch.setattr("builtins.open", lambda *_: file)

    def make() -> torch.Tensor:
        made.append(1)
        return torch.zeros(1000)

    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "x", [computed(f"t{n}", torch.float32, (1000,), make) for n in range(200)])
    assert file.closed
    assert len(made) < 200, "it does not go on computing for a disk that takes nothing"
    assert set(threading.enumerate()) <= before


def test_a_fault_of_the_maker_ends_the_thread(tmp_path: Path) -> None:
    before = threading.active_count()

    def fails() -> torch.Tensor:
        raise HubkitError("HK-NAN", "no")

    with pytest.raises(HubkitError, match="HK-NAN"):
        write_file(tmp_path / "x", [*written(TENSORS), computed("z", torch.float32, (1,), fails)])
    assert threading.active_count() == before
