"""A shared file reads like `io.BytesIO`, in every thread as if it were alone."""

from __future__ import annotations

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubkit.errors import HubkitError
from hubkit.registry.hub.streams import SharedFile, Slice, opened

STEPS = st.lists(
    st.tuples(st.just("read"), st.none() | st.integers(-1, 40))
    | st.tuples(st.just("seek"), st.integers(0, 40))
    | st.tuples(st.just("end"), st.integers(0, 5)),
    max_size=8,
)


def _run(file: io.BufferedIOBase, steps: list[tuple[str, int | None]]) -> list[object]:
    seen: list[object] = []
    for kind, value in steps:
        if kind == "read":
            seen.append(file.read(value))
        else:
            seen.append(file.seek(value or 0, os.SEEK_END if kind == "end" else os.SEEK_SET))
        seen.append(file.tell())
    return seen


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=30), steps=STEPS)
def test_it_reads_like_bytes(tmp_path: Path, data: bytes, steps: list[tuple[str, int | None]]) -> None:
    path = tmp_path / "f"
    path.write_bytes(data)
    for content in (data, path):
        with opened(content) as file:
            assert _run(file, steps) == _run(io.BytesIO(data), steps)


@given(data=st.binary(max_size=30), start=st.integers(0, 30), stop=st.integers(0, 30), steps=STEPS)
def test_a_slice_reads_like_its_bytes(data: bytes, start: int, stop: int, steps: list[tuple[str, int | None]]) -> None:
    start, stop = sorted((min(start, len(data)), min(stop, len(data))))
    piece = Slice(SharedFile(data), start, stop)
    assert len(piece) == stop - start
    assert _run(piece, steps) == _run(io.BytesIO(data[start:stop]), steps)


@pytest.mark.parametrize("on_disk", [True, False])
def test_every_thread_has_its_own_place(tmp_path: Path, on_disk: bool) -> None:
    data = os.urandom(200_000)
    (tmp_path / "f").write_bytes(data)
    start = threading.Barrier(8)
    with opened(tmp_path / "f" if on_disk else data) as file, ThreadPoolExecutor(8) as pool:
        assert isinstance(file, io.BufferedIOBase)

        def read(_: int) -> bytes:
            start.wait()
            return b"".join(iter(lambda: file.read(997), b""))

        assert set(pool.map(read, range(8))) == {data}


def test_only_plain_files(tmp_path: Path) -> None:
    with pytest.raises(HubkitError) as caught, opened(tmp_path / "absent"):
        pass
    assert caught.value.code == "HK-NOT-FOUND"
    assert SharedFile(b"").read() == b""
