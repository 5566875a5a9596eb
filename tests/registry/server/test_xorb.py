"""Xet uploads byte by byte: packed chunks, shards, and what is malformed (the real client runs elsewhere)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

lz4 = pytest.importorskip("lz4.frame")

from hubkit.errors import HubkitError  # noqa: E402
from hubkit.registry.server import xorb  # noqa: E402
from hubkit.registry.server.xorb import Segment, Xorb  # noqa: E402

NAME = "".join(f"{word:016x}" for word in struct.unpack("<4Q", bytes(range(32))))


def grouped(data: bytes) -> bytes:
    return b"".join(data[n::4] for n in range(4))


def packed(data: bytes, scheme: int) -> bytes:
    plain = grouped(data) if scheme == 2 else data
    body = plain if scheme == 0 else lz4.compress(plain)
    return bytes([0]) + len(body).to_bytes(3, "little") + bytes([scheme]) + len(data).to_bytes(3, "little") + body


def shard(segments: list[tuple[int, int, int]], sha256: bytes | None, verification: bool = True) -> bytes:
    flags = (xorb.VERIFICATION if verification else 0) | (xorb.METADATA if sha256 else 0)
    out = xorb.SHARD_TAG + bytes(16) + bytes(32) + struct.pack("<2IQ", flags, len(segments), 0)
    for size, first, last in segments:
        out += bytes(range(32)) + struct.pack("<4I", 0, size, first, last)
    out += bytes(48) * len(segments) * verification
    out += (sha256 + bytes(16)) if sha256 else b""
    return out + b"\xff" * 32 + bytes(16)


@given(data=st.binary(min_size=1, max_size=300), scheme=st.sampled_from([0, 1, 2]))
def test_a_chunk_unpacks_to_what_it_was(data: bytes, scheme: int) -> None:
    raw = packed(data, scheme)
    assert xorb.unpack(raw[8:], scheme, len(data)) == data


@given(
    chunks=st.lists(st.tuples(st.binary(min_size=1, max_size=50), st.sampled_from([0, 1, 2])), min_size=1, max_size=5)
)
def test_segments_of_a_xorb(tmp_path_factory: pytest.TempPathFactory, chunks: list[tuple[bytes, int]]) -> None:
    path = tmp_path_factory.mktemp("x") / "xorb"
    path.write_bytes(b"".join(packed(*c) for c in chunks) + xorb.FOOTER + b"\1 the footer")
    opened = Xorb(path)
    for first in range(len(chunks)):
        for last in range(first + 1, len(chunks) + 1):
            want = b"".join(c[0] for c in chunks[first:last])
            assert b"".join(opened.read(Segment(NAME, len(want), first, last))) == want


def test_a_shard_names_segments_and_digest() -> None:
    digest = hashlib.sha256(b"x").digest()
    for verification in (True, False):
        (parts,) = xorb.read_shard(shard([(5, 0, 1), (7, 2, 4)], digest, verification))
        assert parts.segments == (Segment(NAME, 5, 0, 1), Segment(NAME, 7, 2, 4))
        assert parts.sha256 == "".join(f"{w:016x}" for w in struct.unpack("<4Q", digest))
    (parts,) = xorb.read_shard(shard([(5, 0, 1)], None))
    assert parts.sha256 is None


def outcome(action: Callable[..., object], *arguments: object) -> str:
    try:
        action(*arguments)
    except HubkitError as error:
        return error.code
    return "fine"


@given(cut=st.integers(0, 330), noise=st.binary(max_size=60), at=st.integers(0, 330))
def test_malformed_shards_are_refused_not_crashed_on(cut: int, noise: bytes, at: int) -> None:
    sound = shard([(5, 0, 1), (7, 2, 4)], bytes(32))
    for data in (sound[:cut], sound[:at] + noise + sound[at + len(noise) :]):
        assert outcome(lambda read: list(xorb.read_shard(read)), data) in ("fine", "HK-FILES")


@given(noise=st.binary(max_size=60), at=st.integers(0, 60))
def test_malformed_xorbs_are_refused_not_crashed_on(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int
) -> None:
    sound = packed(b"some words some words", 1) + packed(b"more", 2)
    path = tmp_path_factory.mktemp("x") / "xorb"
    path.write_bytes(sound[:at] + noise + sound[at + len(noise) :])
    assert outcome(lambda: list(Xorb(path).read(Segment(NAME, 25, 0, 2)))) in ("fine", "HK-FILES")


def test_a_chunk_that_grows_is_cut_off(tmp_path: Path) -> None:
    bomb = lz4.compress(bytes(100_000_000))
    with pytest.raises(HubkitError, match="another size"):
        xorb.unpack(bomb, 1, 1000)


@pytest.mark.parametrize(("first", "last", "size"), [(0, 3, 9), (1, 1, 0), (2, 1, 4), (0, 1, 3)])
def test_segments_that_are_not_there(tmp_path: Path, first: int, last: int, size: int) -> None:
    (tmp_path / "x").write_bytes(packed(b"abcd", 0) + packed(b"efgh", 1))
    with pytest.raises(HubkitError):
        list(Xorb(tmp_path / "x").read(Segment(NAME, size, first, last)))
