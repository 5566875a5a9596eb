"""Reading what a Xet client uploads: xorbs (packed chunks) and shards (which chunks make which file).

Formats as in https://github.com/huggingface/xet-core, `xorb_chunk_format.rs` and `file_structs.rs`. Only what is needed
to put a file together; its sha256 is what proves it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hubkit.errors import HubkitError

FOOTER = b"XETBLOB"
SHARD_TAG = b"HFRepoMetaData\0UigEj{\x81W\x83\xa5\xbd\xd9\\\xcd\xd1J\xa9"
NONE, LZ4, GROUPED_LZ4 = 0, 1, 2
VERIFICATION, METADATA = 1 << 31, 1 << 30
RECORD = 48
MAX_CHUNK = 1 << 20
MAX_XORB = 96 << 20
MAX_SHARD = 128 << 20


@dataclass(frozen=True)
class Segment:
    """Chunks ``[first, last)`` of one xorb, `size` bytes when unpacked."""

    xorb: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class FileParts:
    """One file of a shard: its segments in order and its sha256 (64 hex), where the client told it."""

    segments: tuple[Segment, ...]
    sha256: str | None


def _malformed(what: str) -> HubkitError:
    return HubkitError("HK-FILES", f"malformed Xet upload: {what}")


def _hash(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def read_shard(data: bytes) -> Iterator[FileParts]:
    """The files a shard describes; HK-FILES when it is malformed."""
    if data[:32] != SHARD_TAG:
        raise _malformed("not a shard")
    position = RECORD  # after tag, version and footer size
    while True:
        header = _record(data, position)
        if header[:32] == b"\xff" * 32:
            return
        flags, count = struct.unpack_from("<2I", header, 32)
        position += RECORD
        segments = tuple(_segment(_record(data, position + i * RECORD)) for i in range(count))
        position += count * RECORD * (2 if flags & VERIFICATION else 1)
        sha256 = None
        if flags & METADATA:
            sha256 = _hash(_record(data, position)[:32])
            position += RECORD
        yield FileParts(segments, sha256)


def _record(data: bytes, position: int) -> bytes:
    record = data[position : position + RECORD]
    if len(record) != RECORD:
        raise _malformed("shard ends early")
    return record


def _segment(record: bytes) -> Segment:
    _, size, first, last = struct.unpack_from("<4I", record, 32)
    return Segment(_hash(record[:32]), size, first, last)


class Xorb:
    """An uploaded xorb on disk: an index of its chunks, and their bytes on demand."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._chunks: list[tuple[int, int, int, int]] = []
        position, end = 0, len(self._data)
        while position < end and self._data[position : position + len(FOOTER)] != FOOTER:
            if position + 8 > end:
                raise _malformed("xorb ends early")
            version, packed, scheme, size = self._header(position)
            if version != 0 or size > MAX_CHUNK or position + 8 + packed > end:
                raise _malformed("bad chunk in a xorb")
            self._chunks.append((position + 8, packed, scheme, size))
            position += 8 + packed

    def _header(self, position: int) -> tuple[int, int, int, int]:
        raw = self._data[position : position + 8]
        return raw[0], int.from_bytes(raw[1:4], "little"), raw[4], int.from_bytes(raw[5:8], "little")

    def read(self, segment: Segment) -> Iterator[bytes]:
        """The unpacked chunks of a segment."""
        if not segment.first < segment.last <= len(self._chunks):
            raise _malformed("no such chunks in a xorb")
        chosen = self._chunks[segment.first : segment.last]
        if sum(size for *_, size in chosen) != segment.size:
            raise _malformed("segment of another size")
        for start, packed, scheme, size in chosen:
            yield unpack(self._data[start : start + packed], scheme, size)


def unpack(data: bytes, scheme: int, size: int) -> bytes:
    """One chunk as it was: stored, LZ4 frames, or LZ4 frames of bytes grouped by their place modulo 4."""
    if scheme == NONE:
        plain = data
    elif scheme in (LZ4, GROUPED_LZ4):
        plain = _lz4(data, size)
    else:
        raise _malformed(f"unknown compression {scheme}")
    if len(plain) != size:
        raise _malformed("chunk of another size")
    if scheme != GROUPED_LZ4:
        return plain
    out, position = bytearray(size), 0
    for group in range(4):
        length = len(range(group, size, 4))
        out[group::4] = plain[position : position + length]
        position += length
    return bytes(out)


def _lz4(data: bytes, size: int) -> bytes:
    import lz4.frame  # type: ignore[import-untyped]

    try:
        return bytes(lz4.frame.LZ4FrameDecompressor().decompress(data, max_length=size + 1))
    except (RuntimeError, EOFError):
        raise _malformed("chunk cannot be unpacked") from None
