"""One file: read within limits, written whole."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
from pathlib import Path

import pytest

from hubkit.documents.files import read, refusing, write
from hubkit.errors import HubkitError

FORK = multiprocessing.get_context("fork")


def test_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, b"old")
    write(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_write_gives_the_mode_every_new_file_gets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def _write_over_limit(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        write(path, b"x" * (1 << 20))
    except HubkitError as error:
        os._exit(0 if error.code == "HK-DISK" else 1)
    os._exit(2)


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, b"old")
    process = FORK.Process(target=_write_over_limit, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def _die_writing(path: Path) -> None:
    def fsync(fd: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync
    write(path, b"new" * 1000)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, b"old")
    process = FORK.Process(target=_die_writing, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 3, "the old file, the new one and its lock"
    assert path.read_bytes() == b"old"
    write(path, b"newer")
    assert os.listdir(tmp_path) == ["a"]


def test_a_missing_folder_is_a_refusal(tmp_path: Path) -> None:
    with pytest.raises(HubkitError) as caught:
        write(tmp_path / "no" / "a", b"")
    assert caught.value.code == "HK-IO"


def test_read_tells_absence_from_refusal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a", 10)
    (tmp_path / "a").write_bytes(b"x" * 11)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "a" / "b", 10)
    assert len(read(tmp_path / "a", 11)) == 11
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "a", tmp_path / "pipe", tmp_path / ("x" * 300)):
        with pytest.raises(HubkitError) as caught:
            read(path, 10)
        assert caught.value.code == "HK-IO"


def test_the_file_systems_errors_become_refusals() -> None:
    with pytest.raises(HubkitError, match="HK-DISK"), refusing("x"), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    with pytest.raises(HubkitError, match="HK-IO") as caught, refusing("x"):
        os.stat("/nowhere/at/all")
    assert caught.value.where == "/nowhere/at/all"


def test_the_networks_errors_pass() -> None:
    for error in (
        ConnectionResetError(104, "reset"),
        TimeoutError("late"),
        OSError("a library's"),
        socket.gaierror(-2, "?"),
    ):
        with pytest.raises(type(error)) as caught, refusing("x"):
            raise error
        assert caught.value is error
