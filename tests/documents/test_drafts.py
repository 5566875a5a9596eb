"""Locks and private names that processes share: held by one, freed by any end, swept when their writer died."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from hubkit.documents import drafts
from hubkit.documents.drafts import abandoned, claim, held, locked, scratch
from hubkit.errors import HubkitError

FORK = multiprocessing.get_context("fork")
BUSY = HubkitError("HK-BUSY", "busy")


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with held(tmp_path / "a", BUSY):
        with pytest.raises(HubkitError, match="HK-BUSY"), held(tmp_path / "a", BUSY):
            pass
        with held(tmp_path / "b", BUSY):
            pass
    with held(tmp_path / "a", BUSY):
        assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path) == []


def test_a_lock_is_waited_for_by_threads(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(20):
            with locked(tmp_path / "a"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (80, 1)


def _die_holding(folder: Path) -> None:
    with held(folder / "a", BUSY):
        draft = claim(folder, ".x.")
        draft.path.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_dead_hold_nothing(tmp_path: Path) -> None:
    process = FORK.Process(target=_die_holding, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with held(tmp_path / "a", BUSY):
        mine = claim(tmp_path, ".x.")
    left = list(abandoned(tmp_path, ".x."))
    assert [draft.path.is_dir() for draft in left] == [True]
    left[0].end()
    assert len(os.listdir(tmp_path)) == 3, "what is not cleared away keeps its lock file for the next sweep"
    left[0].path.rmdir()
    left[0].end()
    mine.end()
    assert os.listdir(tmp_path) == []


def test_where_the_file_system_has_no_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.ENOLCK, "no locks", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(drafts, "_taken", refuse)
        with scratch(tmp_path) as mine, scratch(tmp_path) as other:
            assert mine != other
            assert {mine.is_dir(), other.is_dir()} == {True}
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_file_system_that_knows_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSYS: nothing is swept there."""

    def unknown(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unknown)
        with scratch(tmp_path) as mine, scratch(tmp_path) as other:
            assert mine != other
            assert {mine.is_dir(), other.is_dir()} == {True}
    assert os.listdir(tmp_path) == []


def test_a_lock_of_a_removed_file_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last holder removes the file after this one opened it: another may make and lock a file of that name."""
    flock, late = fcntl.flock, tmp_path / "a"

    def replaced(handle: int, how: int) -> None:
        late.unlink()
        late.touch()
        flock(handle, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", replaced)
        with pytest.raises(HubkitError, match="HK-BUSY"), held(late, BUSY):
            pass
    with held(late, BUSY):
        assert late.exists()


def test_one_holds_while_others_come_and_go(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(300):
            try:
                with held(tmp_path / "a", BUSY):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except HubkitError:
                continue

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
