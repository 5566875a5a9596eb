"""The head of a GGUF file: metadata and a table of tensors, no values.

    "GGUF", version (u32), tensors (u64), metadata (u64)
    key (string), type (u32), value                                   for each item of metadata
    name (string), dimensions (u32), sizes (u64 each), type (u32), offset (u64)     for each tensor
    zeros up to the alignment, then the tensors' values

All little-endian; a string is its length (u64) and UTF-8. Sizes are written the fast one first, so that a matrix
(out, in) is ``in, out``; here they are turned round, as torch has them.

Read here rather than by the package's ``GGUFReader``: that makes Python objects of every token of the vocabulary, takes
seconds for it, and runs on past the end of a file that was cut off.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit.documents.files import refusing
from hubkit.errors import HubkitError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of metadata -> its struct code."""
FIX = "name the GGUF that was made of this base: llama.cpp's convert_hf_to_gguf.py makes one"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the table.

    Args:
        name: ``blk.0.attn_q.weight``.
        shape: the slow dimension first, as torch has it.
        type: number of its ggml type.
        start: its first byte in the file.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Args:
        path: the file.
        metadata: key -> value; of arrays, their length alone.
        tensors: by name, in the order of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(path: Path) -> Header:
    """The head of the GGUF file `path`.

    Raises:
        HubkitError: ``HK-GGUF`` for what is no GGUF file, cut off, of another version or one of several parts;
            ``HK-EXTRA`` without the package gguf; ``HK-MISSING``, ``HK-IO``.
    """
    if not path.is_file():
        raise HubkitError("HK-MISSING", "there is no such GGUF file", where=str(path), fix=FIX)
    with refusing(path), open(path, "rb") as file:
        if file.read(4) != MAGIC:
            raise _broken(path, "it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(path, data)
            try:
                return reader.header()
            except (UnicodeDecodeError, KeyError, OverflowError, struct.error) as error:
                raise _broken(path, f"{type(error).__name__} at byte {reader.at}") from error


class _Reader:
    """Takes one value after the other, never past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4

    def header(self) -> Header:
        version = self.number("I")
        if version not in VERSIONS:
            raise _broken(self.path, f"version {version}, where {' and '.join(map(str, VERSIONS))} are known")
        tensors, items = self.number("Q"), self.number("Q")
        metadata = {self.string(): self.value(self.number("I")) for _ in range(items)}
        if metadata.get("split.count", 1) > 1:
            raise HubkitError(
                "HK-GGUF",
                "this file is one of several that are a model together",
                where=str(self.path),
                have=f"split.count {metadata['split.count']}",
                fix="join them first: llama-gguf-split --merge",
            )
        table = [self.entry() for _ in range(tensors)]
        step = metadata.get("general.alignment", 32)
        if not isinstance(step, int) or step < 1:
            raise _broken(self.path, f"general.alignment {step!r}")
        begin = -(-self.at // step) * step
        return Header(self.path, metadata, self.placed(table, begin))

    def placed(self, table: list[tuple[str, tuple[int, ...], int, int]], begin: int) -> dict[str, TensorInfo]:
        """The table with each tensor's place in the file."""
        sizes = _sizes()
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in table:
            if kind not in sizes:
                raise _broken(self.path, f"{name}: ggml type {kind}, which the installed package gguf does not know")
            values, width = sizes[kind]
            size = math.prod(shape) // values * width
            if name in found or shape[-1] % values or begin + offset + size > len(self.data):
                have = "named twice" if name in found else "a row of half a block" if shape[-1] % values else "cut off"
                raise _broken(self.path, f"{name}: {have}")
            found[name] = TensorInfo(name, shape, kind, begin + offset, size)
        return found

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset) of one tensor."""
        name, dimensions = self.string(), self.number("I")
        if not 1 <= dimensions <= 4:
            raise _broken(self.path, f"{name}: {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise _broken(self.path, f"{name}: no values")
        return name, shape, self.number("I"), self.number("Q")

    def value(self, kind: int) -> Any:
        """One value of metadata; of an array its length, and its values are passed over."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        return count

    def string(self) -> str:
        size = self.number("Q")
        start = self.at
        self.skip(size)
        return self.data[start : self.at].decode("utf-8")

    def number(self, code: str) -> Any:
        start = self.at
        self.skip(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self.data, start)[0]

    def skip(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise _broken(self.path, f"it ends within its head, at byte {len(self.data)}")
        self.at += size


def package() -> Any:
    """The package gguf: names, types and the writer are its own.

    Raises:
        HubkitError: ``HK-EXTRA`` where it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        what, fix = "GGUF files need the package gguf", "pip install 'hubkit-adapters[gguf]'"
        raise HubkitError("HK-EXTRA", what, have=str(error), fix=fix) from error
    return gguf


def _sizes() -> dict[int, tuple[int, int]]:
    """Number of a ggml type -> values of a block, and its bytes."""
    return {int(kind): sizes for kind, sizes in package().GGML_QUANT_SIZES.items()}


def _broken(path: Path, have: str) -> HubkitError:
    want = "a whole GGUF file of version 2 or 3, little-endian"
    return HubkitError(
        "HK-GGUF", "the file is no GGUF that can be read", where=str(path), want=want, have=have, fix=FIX
    )
