"""A base on disk as one table of tensors, whatever its shards; and the writer that makes a changed copy as a stream.

Untouched tensors are copied as byte ranges, never decoded. Memory: one tensor and a few blocks, whatever the file size.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hubkit.artifact.identity.base_files import local, read_config, weight_headers
from hubkit.artifact.identity.header import TensorInfo, header_length, opened, parse_header
from hubkit.errors import HubkitError
from hubkit.tensors.files.dtypes import COMPUTING, DTYPE_NAMES, torch_dtype

BLOCK = 1 << 24


@dataclass(frozen=True)
class Shards:
    """The weight files of a base.

    Args:
        path: its folder.
        config: its ``config.json``.
        headers: tensor name -> where and what it is, over all files, in the order of files and bytes.
        file_of: tensor name -> file name.
    """

    path: Path
    config: Mapping[str, object]
    headers: Mapping[str, TensorInfo]
    file_of: Mapping[str, str]

    def files(self) -> list[str]:
        """The weight files' names, in order."""
        return list(dict.fromkeys(self.file_of.values()))

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, in memory of its own.

        Raises:
            HubkitError: ``HK-BASE-TENSOR`` when the base has no such tensor.
        """
        if name not in self.headers:
            raise HubkitError("HK-BASE-TENSOR", f"the base has no tensor {name!r}", where=str(self.path))
        info = self.headers[name]
        data = bytearray(info.stop - info.start)
        with open(self.path / self.file_of[name], "rb") as file:
            file.seek(info.start)
            if file.readinto(data) != len(data):
                raise HubkitError("HK-SAFETENSORS", "the file is cut off", where=str(self.path / self.file_of[name]))
        if not data:
            return torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        return torch.frombuffer(data, dtype=torch_dtype(info.dtype)).view(info.shape)

    def copied(self, name: str) -> Written:
        """A tensor taken over byte for byte."""
        info = self.headers[name]

        def blocks() -> Iterator[bytes]:
            with open(self.path / self.file_of[name], "rb") as file:
                file.seek(info.start)
                left = info.stop - info.start
                while left:
                    block = file.read(min(BLOCK, left))
                    if not block:
                        raise HubkitError("HK-SAFETENSORS", "the file is cut off", where=str(file.name))
                    left -= len(block)
                    yield block

        return Written(name, info.dtype, info.shape, blocks)


def open_shards(path: Path) -> Shards:
    """The weight files of the base in folder `path`; only headers are read.

    Raises:
        HubkitError: ``HK-BASE-MISSING`` without a config, ``HK-PICKLE`` or ``HK-BASE-FILES`` without weights or when
            index and files disagree, ``HK-SAFETENSORS`` for a broken file.
    """
    if not (path / "config.json").is_file():
        raise HubkitError(
            "HK-BASE-MISSING",
            "the folder does not hold a base model",
            where=str(path / "config.json"),
            want="config.json and weights in safetensors",
            fix="hubkit pull --base ORG/NAME",
        )
    base = local(path)
    files = weight_headers(base)
    headers = {tensor: info for tensors in files.values() for tensor, info in tensors.items()}
    file_of = {tensor: name for name, tensors in files.items() for tensor in tensors}
    return Shards(path, read_config(base), headers, file_of)


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of an adapter's file, as views of one buffer: the cost of reading the file, and no more.

    Raises:
        HubkitError: ``HK-SAFETENSORS``, ``HK-MISSING``; ``HK-DTYPE`` for tensors that nothing can be computed with.
    """
    import numpy

    with opened(path) as (file, size):
        data = numpy.empty(size, numpy.uint8)
        if file.readinto(data) != size:  # type: ignore[attr-defined]
            raise HubkitError("HK-SAFETENSORS", "the file changes while it is read", where=str(path))
    length = header_length(data[:8].tobytes(), str(path))
    headers = parse_header(data[: 8 + length].tobytes(), size, str(path))
    if wrong := [f"{info.name}: {info.dtype}" for info in headers.values() if info.dtype not in COMPUTING]:
        raise HubkitError(
            "HK-DTYPE",
            f"{len(wrong)} tensors of the adapter are in a dtype that nothing computes in",
            where=str(path),
            want=", ".join(COMPUTING),
            have=wrong,
            fix="save it again in bfloat16 or float32",
        )
    whole = torch.from_numpy(data)
    found: dict[str, Tensor] = {}
    for name, info in headers.items():
        dtype, values = torch_dtype(info.dtype), whole[info.start : info.stop]
        # a file may begin a tensor at any byte, memory may not
        values = values.clone() if info.start % dtype.itemsize else values
        found[name] = values.view(dtype).view(info.shape)
    return found


@dataclass(frozen=True)
class Written:
    """One tensor of a file that is about to be written: what it is and where its values come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], Iterable[bytes | memoryview]]

    @property
    def size(self) -> int:
        return torch.empty(0, dtype=torch_dtype(self.dtype)).element_size() * _count(self.shape)


def computed(name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Written:
    """A tensor that is made when its turn comes, and forgotten after."""

    def blocks() -> Iterator[memoryview]:
        data = tensor_bytes(make())
        for start in range(0, len(data), BLOCK):
            yield data[start : start + BLOCK]

    return Written(name, DTYPE_NAMES[dtype], shape, blocks)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as bytes, little-endian, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data).cast("B") if flat.numel() else memoryview(b"")


def write_file(path: Path, tensors: list[Written]) -> str:
    """Writes one safetensors file, in the given order, as a stream; returns its ``sha256:...``.

    Writing and hashing run in a second thread, beside whatever makes the values.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file, _Sink(file, digest.update) as sink:
        sink.put(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in tensor.values():
                sink.put(block)
    return f"sha256:{digest.hexdigest()}"


class _Sink:
    """A thread that writes and hashes blocks in order; at most four wait."""

    def __init__(self, file: BinaryIO, update: Callable[[bytes | memoryview], None]) -> None:
        self._blocks: queue.Queue[bytes | memoryview | None] = queue.Queue(maxsize=4)
        self._error: Exception | None = None
        self._file, self._update = file, update
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Sink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._blocks.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def put(self, block: bytes | memoryview) -> None:
        if self._error is not None:
            raise self._error
        self._blocks.put(block)

    def _run(self) -> None:
        while (block := self._blocks.get()) is not None:
            if self._error is None:
                try:
                    self._update(block)
                    self._file.write(block)
                except Exception as e:  # raised again in the thread that waits for this one
                    self._error = e


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
