"""Safetensors headers, read by hubkit itself: stricter than the library, and without reading a tensor.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes, the header's length as a little-endian
unsigned integer; the header, one JSON object of ``name: {"dtype", "shape", "data_offsets"}`` with an optional
``"__metadata__"`` of strings; then the values, without gaps. What the library refuses is refused here, with lower
limits: a header from a stranger must not cost memory, and a name must be printable.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from hubkit.errors import HubkitError

HEADER_BYTES: Final = 8 * 2**20
METADATA_BYTES: Final = 2**20
TENSORS: Final = 20_000
RANK: Final = 8
NAME_BYTES: Final = 512

DTYPE_BITS: Final = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits of one value of each dtype the format knows."""

_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it.

    Args:
        name: as in the file.
        dtype: the format's name, e.g. ``BF16``.
        shape: sizes of the dimensions; ``()`` is a scalar.
        start: first byte of its values, counted from the beginning of the file.
        stop: one past its last byte, counted likewise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def header_length(first8: bytes, where: str) -> int:
    """The length in bytes of the JSON after the first eight bytes, within hubkit's limit.

    Raises:
        HubkitError: ``HK-SAFETENSORS`` when the bytes cannot begin a safetensors file.
    """
    if len(first8) < 8:
        raise _refusal(where, f"{len(first8)} bytes" if first8 else "an empty file")
    length = int.from_bytes(first8[:8], "little")
    if length > HEADER_BYTES:
        known = _other_kind(first8)
        raise _refusal(where, known or f"a header of {length} bytes; at most {HEADER_BYTES} are accepted")
    if length < 2:
        raise _refusal(where, f"a header of {length} bytes; '{{}}' has 2")
    return length


def parse_header(head: bytes, size: int, where: str) -> dict[str, TensorInfo]:
    """The tensors of a file, from its first bytes.

    Args:
        head: the first ``8 + header_length`` bytes of the file; more is ignored.
        size: size of the whole file in bytes: the tensors must cover it exactly.
        where: the file, for messages.

    Returns:
        Name to tensor, in the order of the file's bytes; ranges are absolute.

    Raises:
        HubkitError: ``HK-SAFETENSORS``.
    """
    length = header_length(head[:8], where)
    if 8 + length > size or len(head) < 8 + length:
        raise _refusal(where, f"a header of {length} bytes in a file of {min(size, len(head))} bytes: it is cut off")
    document = _load(head[8 : 8 + length], where)
    _check_metadata(document.pop("__metadata__", None), where)
    if len(document) > TENSORS:
        raise _refusal(where, f"{len(document)} tensors; at most {TENSORS} are accepted")
    infos = [_tensor(name, entry, 8 + length, where) for name, entry in document.items()]
    infos.sort(key=lambda info: (info.start, info.stop))
    expected = 8 + length
    for info in infos:
        if info.start != expected:
            raise _refusal(where, f"tensor {info.name!r} that begins at byte {info.start}, not {expected}")
        expected = info.stop
    if expected != size:
        raise _refusal(where, f"tensors up to byte {expected} in a file of {size} bytes")
    return {info.name: info for info in infos}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of the safetensors file at `path`; only its header is read.

    Raises:
        HubkitError: ``HK-MISSING`` when there is no such file, ``HK-SAFETENSORS`` when it is not a whole one.
    """
    with opened(path) as (file, size):
        first = file.read(8)
        return parse_header(first + file.read(header_length(first, str(path))), size, str(path))


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The safetensors file at `path` and its size in bytes, open for reading.

    Raises:
        HubkitError: ``HK-MISSING`` when there is no such file, ``HK-SAFETENSORS`` when it cannot be read.
    """
    where = str(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _refusal(where, "not a regular file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise HubkitError("HK-MISSING", "a file is missing", where=where, fix="fetch the file again") from None
    except OSError as error:
        raise _refusal(where, f"unreadable: {error.strerror}") from None


def _load(data: bytes, where: str) -> dict[str, Any]:
    if data[:1] != b"{":
        raise _refusal(where, "a header that does not begin with '{'")
    try:
        document: dict[str, Any] = json.loads(  # an object: it begins like one
            data.decode(),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
        if b"\\u" in data:
            # surrogates escaped as \udXXX pass json but no UTF-8 encoder: the library refuses them, too
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise _refusal(where, f"a header that is not the format's JSON: {reason[:200]}") from None
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else ["many"]
        raise ValueError(f"duplicate names {', '.join(map(repr, twice))}")
    return out


def _natural(text: str) -> int:
    if text[0] == "-" or len(text) > 19:
        raise ValueError(f"the number {text[:30]} where a size or an offset belongs")
    return int(text)


def _no_number(text: str) -> Any:
    raise ValueError(f"the number {text[:30]} where a size or an offset belongs")


def _check_metadata(metadata: Any, where: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refusal(where, "__metadata__ that is not an object of strings")
    size = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
    if size > METADATA_BYTES:
        raise _refusal(where, f"{size} bytes of __metadata__; at most {METADATA_BYTES} are accepted")


def _tensor(name: str, entry: Any, offset: int, where: str) -> TensorInfo:
    _check_tensor_name(name, where)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _refusal(where, f"tensor {name!r} without exactly the fields {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _refusal(where, f"tensor {name!r} of the unknown dtype {dtype!r}")
    if not _sizes(shape) or len(shape) > RANK:
        raise _refusal(where, f"tensor {name!r} of the shape {str(shape)[:80]}; at most {RANK} dimensions are accepted")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refusal(where, f"tensor {name!r} with the data_offsets {str(offsets)[:80]}")
    count = math.prod(shape)
    # dimensions beside a zero may not overflow either: every reader multiplies them
    if (count or math.prod(max(size, 1) for size in shape)) >= 2**60:
        raise _refusal(where, f"tensor {name!r} of the shape {shape}: too large")
    total = count * bits
    if total != 8 * (offsets[1] - offsets[0]):
        have = f"{offsets[1] - offsets[0]} bytes for tensor {name!r}, {dtype} {shape}, which takes {total / 8:g}"
        raise _refusal(where, have)
    return TensorInfo(name, dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def _check_tensor_name(name: str, where: str) -> None:
    # names stand in lines of digests, in keys of dictionaries and in messages; ' ' is the only printable white space
    plain = bool(name) and name.isprintable() and " " not in name and "\\" not in name
    if not plain or len(name.encode()) > NAME_BYTES or ("/" in name and _climbs(name)) or name == "..":
        raise _refusal(where, f"a tensor with the name {name[:80]!r}")


def _climbs(name: str) -> bool:
    return ".." in name.split("/") or name.startswith("/")


def _sizes(value: Any) -> bool:
    return type(value) is list and {int}.issuperset(map(type, value))


def _other_kind(head: bytes) -> str | None:
    if head.startswith(b"version "):
        return "a Git LFS pointer instead of the file it points to; run 'git lfs pull'"
    if head.startswith((b"PK", b"\x80")):
        return "a pickled PyTorch file"
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    if head.startswith(b"<"):
        return "a web page"
    return None


def _refusal(where: str, have: str) -> HubkitError:
    return HubkitError(
        "HK-SAFETENSORS",
        "not a valid safetensors file",
        where=where,
        want="8 bytes of length, a JSON header, then exactly the tensors' bytes",
        have=have,
        fix="fetch the file again, or write it anew with the safetensors library",
    )
