"""Folders that appear complete or not at all: writers are killed, interrupted, starved and raced, for real."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nobody import as_nobody

from hubkit.artifact import staging
from hubkit.artifact.staging import exchange, recover, staged, wait_for
from hubkit.errors import HubkitError

FORK = multiprocessing.get_context("fork")
COUNT = 4


def _fill(folder: Path, text: str) -> None:
    (folder / "sub").mkdir()
    for number in range(COUNT):
        (folder / "sub" / f"{number}").write_text(text * 500)


def _make(dest: Path, text: str, *, replace: bool = False, error: Any = None) -> None:
    with staged(dest, replace=replace) as stage:
        _fill(stage, text)
        if error:
            raise error


def _content(dest: Path) -> str:
    """The text a folder was filled with; fails when it is not the work of one writer."""
    texts = {(dest / "sub" / str(number)).read_text() for number in range(COUNT)}
    assert len(texts) == 1
    text = texts.pop()
    assert text == text[0] * 500
    return text[0]


def _run(target: Callable[..., None], *args: Any) -> int | None:
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    dest = tmp_path / "deep" / "er" / "dest"
    with staged(dest) as stage:
        _fill(stage, "a")
        assert stage.parent == dest.parent
        assert not dest.exists()
    assert _content(dest) == "a"
    assert os.listdir(dest.parent) == ["dest"]


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    _make(dest, "a")
    with pytest.raises(HubkitError) as caught:
        _make(dest, "b")
    assert caught.value.code == "HK-EXISTS"
    (tmp_path / "file").touch()
    for replace in (False, True):
        with pytest.raises(HubkitError, match="HK-EXISTS"):
            _make(tmp_path / "file", "b", replace=replace)
    assert _content(dest) == "a"
    assert sorted(os.listdir(tmp_path)) == ["dest", "file"]


def test_what_takes_the_place_meanwhile_is_not_touched(tmp_path: Path) -> None:
    dest = tmp_path / "dest"

    def overtaken() -> None:
        with staged(dest) as stage:
            _fill(stage, "b")
            dest.mkdir()
            _fill(dest, "a")

    with pytest.raises(HubkitError) as caught:
        overtaken()
    assert caught.value.code == "HK-EXISTS"
    assert _content(dest) == "a"
    assert os.listdir(tmp_path) == ["dest"]


def test_a_place_that_is_taken_again_and_again_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer is always faster, where names cannot be exchanged: an end instead of a race without one."""
    dest, rename = tmp_path / "dest", os.rename
    _make(dest, "a")
    monkeypatch.setattr(staging, "_renameat2", lambda: None)

    def raced(source: Path, target: Path) -> None:
        rename(source, target)
        if source == dest:
            dest.mkdir()
            _fill(dest, "c")

    monkeypatch.setattr(os, "rename", raced)
    with pytest.raises(HubkitError, match="busy") as caught:
        _make(dest, "b", replace=True)
    assert caught.value.code == "HK-IO"
    assert _content(dest) == "c"
    assert os.listdir(tmp_path) == ["dest"]


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace: file systems differ in what they offer."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_renameat2", lambda: None)
    return str(request.param)


def test_replacing_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path: Path, way: str) -> None:
    dest = tmp_path / "dest"
    _make(dest, "a", replace=True)
    with staged(dest, replace=True) as stage:
        assert _content(dest) == "a"
        _fill(stage, "b")
        assert _content(dest) == "a"
    assert _content(dest) == "b"
    assert os.listdir(tmp_path) == ["dest"]


def test_a_link_is_followed(tmp_path: Path, way: str) -> None:
    _make(tmp_path / "real" / "dest", "a")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "dest")
    _make(tmp_path / "link", "b", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert _content(tmp_path / "real" / "dest") == "b"
    assert os.listdir(tmp_path / "real") == ["dest"]


def test_read_only_folders_are_replaced_and_made(tmp_path: Path, way: str) -> None:
    dest = tmp_path / "dest"
    for text in "ab":
        with staged(dest, replace=True) as stage:
            _fill(stage, text)
            for path in (stage / "sub" / "0", stage / "sub", stage):
                path.chmod(0o555 if path.is_dir() else 0o444)
    assert _content(dest) == "b"
    assert dest.stat().st_mode & 0o777 == 0o555
    assert os.listdir(tmp_path) == ["dest"]
    for path in (dest, dest / "sub"):
        path.chmod(0o755)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit, HubkitError("HK-X", "x")])
@pytest.mark.parametrize("old", [False, True])
def test_an_exception_leaves_the_old_or_nothing(tmp_path: Path, error: Any, old: bool) -> None:
    dest = tmp_path / "dest"
    if old:
        _make(dest, "a")
    with pytest.raises(error if isinstance(error, type) else HubkitError):
        _make(dest, "b", replace=True, error=error)
    assert os.listdir(tmp_path) == (["dest"] if old else [])
    assert not old or _content(dest) == "a"


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom hubkit.artifact.staging import staged\n"
        "with staged(pathlib.Path(sys.argv[1])) as stage:\n"
        "    (stage / 'a').write_bytes(b'x')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "dest")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(os.listdir(tmp_path)) == 2
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert os.listdir(tmp_path) == []


def _die_at(count: int, dest: Path, text: str) -> None:
    """Write, and be killed before the `count`-th step that touches the file system; exit 0 when there are fewer."""
    steps = itertools.count(1)
    touching = ("open", "os.", "shutil.")

    def step(event: str, _args: tuple[Any, ...]) -> None:
        if event.startswith(touching) and next(steps) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(step)
    _make(dest, text, replace=True)
    os._exit(0)


@pytest.mark.parametrize("first", [False, True])
def test_killed_before_any_step_there_is_the_old_or_the_new(tmp_path: Path, way: str, first: bool) -> None:
    seen = set()
    for count in range(1, 1000):
        folder = tmp_path / str(count)
        folder.mkdir()
        dest = folder / "dest"
        if not first:
            _make(dest, "a")
        done = _run(_die_at, count, dest, "b")
        if way == "exchange" and not first:
            _content(dest)  # not even for a moment without a folder
        wait_for(dest)
        seen.add(_content(dest) if dest.exists() else None)
        _make(dest, "c", replace=True)
        assert _content(dest) == "c"
        assert os.listdir(folder) == ["dest"]
        shutil.rmtree(folder)
        if done == 0:
            break
    assert count > 20
    assert seen == {None if first else "a", "b"}


def _write_forever(dest: Path) -> None:
    for text in itertools.cycle("abcdefgh"):
        _make(dest, text, replace=True)


def test_killed_at_random_moments_there_is_always_one_whole_folder(tmp_path: Path, way: str) -> None:
    dest = tmp_path / "dest"
    _make(dest, "z")
    generator = random.Random(0)
    for _ in range(40):
        process = FORK.Process(target=_write_forever, args=(dest,))
        process.start()
        time.sleep(generator.uniform(0, 0.02))
        process.kill()
        process.join()
        wait_for(dest)
        _content(dest)
    _make(dest, "y", replace=True)
    assert os.listdir(tmp_path) == ["dest"]


def _race(dest: Path, text: str, replace: bool, start: Any) -> None:
    start.wait()
    try:
        _make(dest, text, replace=replace)
    except HubkitError as error:
        os._exit(7 if error.code == "HK-EXISTS" else 1)
    os._exit(0)


def _race_all(dest: Path, replace: bool) -> list[int]:
    start = FORK.Barrier(6)
    processes = [FORK.Process(target=_race, args=(dest, text, replace, start)) for text in "abcdef"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sorted(process.exitcode or 0 for process in processes)


def test_of_several_writers_one_makes_the_folder(tmp_path: Path) -> None:
    for number in range(5):
        dest = tmp_path / f"dest{number}"
        assert _race_all(dest, False) == [0, 7, 7, 7, 7, 7]
        _content(dest)
    assert len(os.listdir(tmp_path)) == 5


def test_of_several_replacements_one_stays_and_none_mix(tmp_path: Path, way: str) -> None:
    dest = tmp_path / "dest"
    _make(dest, "z")
    for _ in range(5):
        assert _race_all(dest, True) == [0] * 6
        assert _content(dest) in "abcdef"
    assert os.listdir(tmp_path) == ["dest"]


def test_a_reader_always_finds_the_folder_where_names_can_be_exchanged(tmp_path: Path) -> None:
    if not exchange(*_two_folders(tmp_path)):
        pytest.skip("this file system cannot exchange names")
    dest = tmp_path / "dest"
    _make(dest, "z")
    process = FORK.Process(target=_write_forever, args=(dest,))
    process.start()
    try:
        assert all(dest.exists() for _ in range(5000))
    finally:
        process.kill()
        process.join()


def _two_folders(parent: Path) -> tuple[Path, Path]:
    made = parent / "x", parent / "y"
    for folder in made:
        folder.mkdir()
    return made


def test_exchange_changes_nothing_when_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert exchange(tmp_path / "a", tmp_path / "b") is False
    assert os.listdir(tmp_path) == ["a"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    with staged(dest) as stage:
        recover(dest)
        with pytest.raises(HubkitError, match="HK-X"), staged(dest):
            raise HubkitError("HK-X", "x")
        _fill(stage, "a")
    assert _content(dest) == "a"


def test_neighbours_with_like_names_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ("dest." + "0" * 16)
    assert _run(_die_at, 9, other, "a") == -signal.SIGKILL
    (tmp_path / ".dest.notes.lock").touch()
    before = sorted(os.listdir(tmp_path))
    _make(tmp_path / "dest", "a")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "dest"])


def test_long_names(tmp_path: Path, way: str) -> None:
    dest = tmp_path / ("n" * 255)
    for text in "ab":
        _make(dest, text, replace=True)
    assert _content(dest) == "b"
    assert len(os.listdir(tmp_path)) == 1


def _fill_disk(dest: Path) -> None:
    with staged(dest) as stage:
        (stage / "a").write_bytes(b"x" * 1000)
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(HubkitError) as caught:
        _fill_disk(tmp_path / "dest")
    assert caught.value.code == "HK-DISK"
    assert os.listdir(tmp_path) == []


def _fill_up(dest: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        with staged(dest) as stage:
            (stage / "a").write_bytes(b"x" * (1 << 20))
    except HubkitError as error:
        os._exit(0 if error.code == "HK-DISK" else 1)
    os._exit(2)


def test_a_limit_on_sizes_leaves_nothing(tmp_path: Path) -> None:
    assert _run(_fill_up, tmp_path / "dest") == 0
    assert os.listdir(tmp_path) == []


def _without_rights(dest: Path, replace: bool) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        _make(dest, "b", replace=replace)
    except HubkitError as error:
        os._exit(0 if error.code == "HK-IO" and error.where.startswith(str(dest.parent)) else 1)
    os._exit(2)


def test_missing_rights_are_a_refusal() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        parent = Path(folder) / "parent"
        _make(parent / "dest", "a")
        parent.chmod(0o555)
        assert _run(_without_rights, parent / "dest", True) == 0
        assert _run(_without_rights, parent / "new", False) == 0
        parent.chmod(0o755)
        assert _content(parent / "dest") == "a"
        assert os.listdir(parent) == ["dest"]


def test_a_folder_that_cannot_be_made_durable_is_a_refusal(common: Path) -> None:
    """What was put into it cannot be listed, so nobody knows whether it is on the disk."""
    common.chmod(0o777)

    def close() -> None:
        with staged(common / "dest") as stage:
            _fill(stage, "a")
            (stage / "sub").chmod(0)

    assert as_nobody(close) == "HK-IO"
    assert os.listdir(common) == []
