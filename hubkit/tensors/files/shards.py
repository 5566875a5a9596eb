"""A base on disk as one table of tensors, whatever its shards; and the writer that makes a changed copy as a stream.

Untouched tensors are copied as byte ranges, never decoded. Memory: the buffers of a `Pipeline`, whatever the file size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hubkit.artifact.identity.base_files import WEIGHTS, local, read_config, weight_headers
from hubkit.artifact.identity.header import TensorInfo, header_length, opened, parse_header
from hubkit.errors import HubkitError
from hubkit.tensors.files.dtypes import COMPUTING, DTYPE_NAMES, torch_dtype
from hubkit.tensors.files.pipeline import Block, Piece, Pipeline

BLOCK = 1 << 22
"""Bytes of one block of a tensor that is copied: several fit caches, so that writing and hashing find them there."""
CALL = 1 << 18
"""Bytes of one call that writes: for larger ones Linux looks for contiguous memory, at up to five times the cost."""

Make = Callable[[Tensor, Tensor], None]


class ReadTensor(Protocol):
    """Reads a tensor of a base's files by its name, or one of the matrices that it is a row of."""

    def __call__(self, name: str, number: int | None = None, /) -> Tensor: ...


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

    def read(self, name: str, number: int | None = None, /) -> Tensor:
        """One tensor, as stored, in memory of its own.

        Args:
            number: read this one alone of what lies one after the other along its first dimension.

        Raises:
            HubkitError: ``HK-BASE-TENSOR`` when the base has no such tensor.
        """
        if name not in self.headers:
            raise HubkitError("HK-BASE-TENSOR", f"the base has no tensor {name!r}", where=str(self.path))
        info = self.headers[name]
        start, size, shape = info.start, info.stop - info.start, info.shape
        if number is not None:
            size, shape = size // shape[0], shape[1:]
            start += number * size
        data = bytearray(size)
        with open(self.path / self.file_of[name], "rb") as file:
            file.seek(start)
            if file.readinto(data) != len(data):
                raise HubkitError("HK-SAFETENSORS", "the file is cut off", where=str(self.path / self.file_of[name]))
        if not data:
            return torch.empty(shape, dtype=torch_dtype(info.dtype))
        return torch.frombuffer(data, dtype=torch_dtype(info.dtype)).view(shape)

    def rows(self, name: str, part: slice) -> Tensor:
        """Some rows of a tensor as stored, of which the file holds the values (`holds`); no others are read."""
        info = self.headers[name]
        width = (info.stop - info.start) // info.shape[0]
        data = bytearray((part.stop - part.start) * width)
        with open(self.path / self.file_of[name], "rb") as file:
            file.seek(info.start + part.start * width)
            if file.readinto(data) != len(data):
                raise HubkitError("HK-SAFETENSORS", "the file is cut off", where=str(self.path / self.file_of[name]))
        return torch.frombuffer(data, dtype=torch_dtype(info.dtype)).view(-1, *info.shape[1:])

    def range(self, name: str, first: int, last: int, size: int, make: Make | None = None) -> Piece:
        """Bytes `first` to `last` of a tensor as its file holds them, to be made into `size` others; see `Piece`."""
        start = self.headers[name].start
        return Piece(self.path / self.file_of[name], start + first, start + last, size, make)

    def holds(self, name: str) -> bool:
        """Whether the file's bytes of a tensor are its values, as `read` gives them."""
        return name in self.headers

    def copied(
        self, name: str, dtype: torch.dtype | None = None, make: Make | None = None, part: slice | None = None
    ) -> Written:
        """A tensor taken over byte for byte, or made into another `dtype` by `make`, a block at a time.

        Args:
            part: of its first dimension; None: the whole tensor.
        """
        info = self.headers[name]
        width = torch_dtype(info.dtype).itemsize if dtype else 1
        row = torch_dtype(info.dtype).itemsize * math.prod(info.shape[1:])
        first, last = (0, info.stop - info.start) if part is None else (part.start * row, part.stop * row)

        def blocks() -> Iterator[Piece]:
            for at in range(first, last, BLOCK):
                stop = min(at + BLOCK, last)
                yield self.range(name, at, stop, (stop - at) // width * (dtype.itemsize if dtype else 1), make)

        shape = info.shape if part is None else (part.stop - part.start, *info.shape[1:])
        return Written(name, DTYPE_NAMES[dtype] if dtype else info.dtype, shape, blocks)


@contextmanager
def unwritten(paths: Iterable[Path]) -> Iterator[None]:
    """Refuses files whose size, time or inode is another at the end of the block: ``HK-IO``."""

    def state(path: Path) -> tuple[int, int, int]:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns, status.st_ino

    before = {path: state(path) for path in paths}
    yield
    for path, was in before.items():
        if state(path) != was:
            fix = "run again when nothing writes to it"
            raise HubkitError("HK-IO", "a file changed while it was read", where=str(path), fix=fix)


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


def read_file(path: Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """All tensors of an adapter's file, as views of one buffer: the cost of reading the file, and no more.

    Args:
        path: the file.
        mapped: the buffer is the file itself, whose pages are read when they are used and take no memory of the
            process's own; nobody may write to it meanwhile (see `unwritten`).

    Raises:
        HubkitError: ``HK-SAFETENSORS``, ``HK-MISSING``; ``HK-DTYPE`` for tensors that nothing can be computed with.
    """
    import numpy

    with opened(path) as (file, size):
        data = numpy.memmap(file, numpy.uint8, "c") if mapped and size else numpy.empty(size, numpy.uint8)
        if not isinstance(data, numpy.memmap) and file.readinto(data) != size:  # type: ignore[attr-defined]
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
    """One tensor of a file that is about to be written: what it is and where its bytes come from, block by block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Block]]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch_dtype(self.dtype).itemsize * math.prod(self.shape)


def split(tensors: Iterable[Written], limit: int) -> dict[str, list[Written]]:
    """File name -> its tensors, at most `limit` bytes of them, in order.

    The rule and the names are those of huggingface_hub's ``split_state_dict_into_shards_factory``: a file is full when
    the next tensor would take it above the limit; a tensor above it has a file of its own.
    """
    files: list[list[Written]] = []
    current: list[Written] = []
    size = 0
    for one in tensors:
        if one.size > limit:
            files.append([one])
            continue
        if size + one.size > limit:
            files.append(current)
            current, size = [], 0
        current.append(one)
        size += one.size
    files += [current] if current else []
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": held for n, held in enumerate(files, 1)}


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


def write_file(path: Path, tensors: Sequence[Written], pipeline: Pipeline | None = None) -> str:
    """Writes one safetensors file, in the given order, as a stream; returns its ``sha256:...``.

    Args:
        path: the file.
        tensors: what it will hold.
        pipeline: an open one, to be used for several files; one of its own when None.
    """
    if pipeline is None:
        with Pipeline() as own:
            return write_file(path, tensors, own)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(view: memoryview) -> None:
            for at in range(0, len(view), CALL):
                file.write(view[at : at + CALL])

        pipeline.run(chain([_head(tensors)], *(tensor.blocks() for tensor in tensors)), write, digest.update)
    return f"sha256:{digest.hexdigest()}"


def _head(tensors: Iterable[Written]) -> bytes:
    """Length and header of a file with these tensors."""
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
    return len(text).to_bytes(8, "little") + text
