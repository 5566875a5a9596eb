"""The header reader against the safetensors library: what it accepts we read alike, what it refuses we refuse."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save, save_file

from hubkit.artifact.identity import header
from hubkit.artifact.identity.header import TensorInfo, header_length, parse_header, read_header
from hubkit.errors import HubkitError

ARRAYS = {"a": np.arange(6, dtype="<f4").reshape(2, 3), "b.weight": np.zeros((0, 4), "<f2"), "s": np.array(3, "<i8")}

names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\/"), min_size=1, max_size=12)
arrays = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(["<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "u1", "?", "<u2", "<u4", "<u8"]),
)


def _file(document: Any, data: bytes = b"") -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(body)) + body + data


def _parse(data: bytes) -> dict[str, TensorInfo]:
    return parse_header(data, len(data), "x.safetensors")


def _entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


@given(st.dictionaries(names.filter(lambda n: n not in ("__metadata__", "..")), arrays, max_size=5))
def test_round_trip_with_the_library(tensors: dict[str, np.ndarray]) -> None:
    data = save(tensors, metadata={"format": "pt"})
    want = {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in deserialize(data)}
    have = {i.name: (i.dtype, i.shape, data[i.start : i.stop]) for i in _parse(data).values()}
    assert have == want


@settings(max_examples=400)
@given(st.data())
def test_what_the_library_refuses_is_refused(data: st.DataObject) -> None:
    good = bytearray(save(ARRAYS, metadata={"format": "pt"}))
    length = struct.unpack("<Q", good[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 8 + length - 1))
        good[at] = data.draw(st.sampled_from(b'{}[]",:0123456789-eE.tfn \\\0\xff') | st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 7, len(good) - 5]))
    _same_verdict(bytes(good[: len(good) - cut]) if cut else bytes(good) + b"\0" * data.draw(st.integers(0, 1)))


def _same_verdict(data: bytes) -> None:
    try:
        mine = _parse(data)
    except HubkitError:
        return
    theirs = deserialize(data)  # what we accept the library accepts, too, and reads alike
    assert {(n, e["dtype"], tuple(e["shape"]), len(e["data"])) for n, e in theirs} == {
        (i.name, i.dtype, i.shape, i.stop - i.start) for i in mine.values()
    }


BAD = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": struct.pack("<Q", 0),
    "length only": struct.pack("<Q", 100),
    "huge length": struct.pack("<Q", 2**63) + b"{}",
    "list": _file([]),
    "nothing": _file(b"null"),
    "text after": _file(b"{} {}"),
    "not utf-8": _file(b'{"\xff":1}'),
    "surrogate": _file(b'{"__metadata__":{"a":"\\ud800"}}'),
    "NaN": _file(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', b"ab"),
    "minus zero": _file(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}', b"ab"),
    "float": _file(b'{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}', b"ab"),
    "twice": _file(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},' * 2 + b'"b":1}', b"ab"),
    "metadata not text": _file({"__metadata__": {"a": 1}}),
    "metadata list": _file({"__metadata__": []}),
    "unknown dtype": _file({"a": _entry("F128")}, b"ab"),
    "dtype number": _file({"a": _entry(8)}, b"ab"),
    "true as size": _file({"a": _entry(shape=[True, 2])}, b"ab"),
    "negative": _file({"a": _entry(shape=[-2])}, b"ab"),
    "huge number": _file(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,2]}}', b"ab"),
    "overflow": _file({"a": _entry(shape=[2**62, 8])}, b"ab"),
    "backwards": _file({"a": _entry(offsets=[2, 0])}, b"ab"),
    "too few bytes": _file({"a": _entry(shape=[3])}, b"ab"),
    "half a byte": _file({"a": _entry("F4", [3])}, b"ab"),
    "overlap": _file({"a": _entry(), "b": _entry(offsets=[1, 3])}, b"abc"),
    "gap": _file({"a": _entry(), "b": _entry(offsets=[3, 5])}, b"abcde"),
    "not from the start": _file({"a": _entry(offsets=[1, 3])}, b"abc"),
    "bytes after": _file({"a": _entry()}, b"abc"),
    "cut off": _file({"a": _entry()}, b"a"),
    "missing field": _file({"a": {"dtype": "U8", "shape": [2]}}, b"ab"),
    "pickle": b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.",
    "zip": b"PK\x03\x04" + b"\0" * 40,
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "web page": b"<!DOCTYPE html><html></html>",
    "deep": _file(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_by_both(case: str) -> None:
    with pytest.raises(SafetensorError):
        deserialize(BAD[case])
    with pytest.raises(HubkitError) as caught:
        _parse(BAD[case])
    assert caught.value.code == "HK-SAFETENSORS"
    assert caught.value.where == "x.safetensors"


STRICTER = {
    "twice the same": _file(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b"ab",
    ),
    "metadata twice": _file(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "extra field": _file({"a": _entry(more=1)}, b"ab"),
    "leading space": _file(b" {}"),
    "rank 9": _file({"a": _entry(shape=[1] * 8 + [2])}, b"ab"),
    "zero beside huge": _file({"a": _entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}),
    "empty name": _file({"": _entry()}, b"ab"),
    "NUL in the name": _file({"a\0b": _entry()}, b"ab"),
    "right to left": _file({"a\u202eb": _entry()}, b"ab"),
    "space in the name": _file({"a b": _entry()}, b"ab"),
    "path in the name": _file({"../../a": _entry()}, b"ab"),
    "absolute name": _file({"/a": _entry()}, b"ab"),
    "backslash": _file({"a\\b": _entry()}, b"ab"),
    "long name": _file({"a" * 513: _entry()}, b"ab"),
    "much metadata": _file({"__metadata__": {"a": "b" * (header.METADATA_BYTES + 1)}}),
    "many tensors": _file({f"t{i}": _entry(shape=[0], offsets=[0, 0]) for i in range(header.TENSORS + 1)}),
    "long header": _file(b"{" + b" " * header.HEADER_BYTES + b"}"),
}


@pytest.mark.parametrize("case", STRICTER)
def test_limits_below_the_library(case: str) -> None:
    with pytest.raises(HubkitError) as caught:
        _parse(STRICTER[case])
    assert caught.value.code == "HK-SAFETENSORS"


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(ARRAYS, path)
    infos = read_header(path)
    data = path.read_bytes()
    assert list(infos) == sorted(infos, key=lambda name: infos[name].start)
    for name, array in ARRAYS.items():
        assert data[infos[name].start : infos[name].stop] == array.tobytes()
        assert infos[name].shape == array.shape
    first = data[: 8 + header_length(data[:8], "m")]
    assert parse_header(first, len(data), "m") == infos  # range reads see the same


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(HubkitError) as caught:
        read_header(tmp_path / "absent.safetensors")
    assert caught.value.code == "HK-MISSING"
    with pytest.raises(HubkitError) as caught:
        read_header(tmp_path)
    assert caught.value.code == "HK-SAFETENSORS"
    for case, data in BAD.items():
        path = tmp_path / "bad.safetensors"
        path.write_bytes(data)
        with pytest.raises(HubkitError) as caught:
            read_header(path)
        assert caught.value.code == "HK-SAFETENSORS", case
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(HubkitError, match="unreadable") as caught:
        read_header(tmp_path / "loop")
    assert caught.value.code == "HK-SAFETENSORS"
    assert "git lfs pull" in str(_refused(tmp_path, BAD["lfs pointer"]))
    assert "pickled" in str(_refused(tmp_path, BAD["pickle"]))


def _refused(folder: Path, data: bytes) -> HubkitError:
    (folder / "bad.safetensors").write_bytes(data)
    with pytest.raises(HubkitError) as caught:
        read_header(folder / "bad.safetensors")
    return caught.value
