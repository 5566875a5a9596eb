"""A lock that git could not merge: rebuilt from what both sides pin, and what is lost is said."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
from documents.test_lock import LOCK

from hubkit.documents.lock import Lock
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError
from hubkit.locking.conflicts import rebuilt

SQL, CHAT = LOCK.adapters
MORE = dataclasses.replace(CHAT, name="more", source="ana/more")
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def merged(folder: Path, base: Lock, ours: Lock, theirs: Lock, *style: str) -> bytes:
    """What git leaves of two changes of one lock."""
    for name, lock in (("base", base), ("ours", ours), ("theirs", theirs)):
        (folder / name).write_bytes(lock.to_bytes())
    line = ["git", "merge-file", "-p", *style, "ours", "base", "theirs"]
    return subprocess.run(line, cwd=folder, capture_output=True, check=False).stdout


def recipe(lock: Lock, name: str) -> Lock:
    return dataclasses.replace(lock, recipe=sha256(name.encode()))


@pytest.mark.parametrize("style", [(), ("--diff3",)], ids=["two", "three"])
def test_both_sides_added_an_adapter(tmp_path: Path, style: tuple[str, ...]) -> None:
    other = dataclasses.replace(MORE, name="other", source="ana/other")
    ours = recipe(dataclasses.replace(LOCK, adapters=(SQL, CHAT, MORE)), "ours")
    theirs = recipe(dataclasses.replace(LOCK, adapters=(SQL, CHAT, other)), "theirs")
    data = merged(tmp_path, LOCK, ours, theirs, *style)
    with pytest.raises(HubkitError, match="merge conflicts") as caught:
        Lock.from_bytes(data)
    assert "hubkit lock" in caught.value.fix
    pins = rebuilt(data, "hubkit.lock")
    assert (pins.lost, pins.base) == ((), LOCK.base)
    assert set(pins.adapters.values()) == {SQL, CHAT, MORE, other}


def test_where_they_disagree_both_are_said_and_neither_is_taken(tmp_path: Path) -> None:
    def moved(version: str, commit: str) -> Lock:
        chat = dataclasses.replace(CHAT, version=version, revision=commit * 40, digest=sha256(version.encode()))
        return dataclasses.replace(LOCK, adapters=(SQL, chat))

    pins = rebuilt(merged(tmp_path, LOCK, moved("1.3.0", "d"), moved("1.4.0", "e")), "hubkit.lock")
    assert pins.lost == ("chat: 1.3.0 (dddddddddddd) in ours, 1.4.0 (eeeeeeeeeeee) in theirs",)
    assert set(pins.adapters.values()) == {SQL}


def test_two_bases(tmp_path: Path) -> None:
    ours, theirs = (
        dataclasses.replace(LOCK, base=dataclasses.replace(LOCK.base, revision=letter * 40)) for letter in "de"
    )
    pins = rebuilt(merged(tmp_path, LOCK, ours, theirs), "hubkit.lock")
    assert pins.base is None
    assert pins.lost == ("base: dddddddddddd in ours, eeeeeeeeeeee in theirs",)


def test_a_side_that_is_no_lock_is_lost_alone() -> None:
    sound = LOCK.to_bytes()
    pins = rebuilt(b"<<<<<<< HEAD\n" + sound + b"=======\n{}\n>>>>>>> feature/x\n", "hubkit.lock")
    assert set(pins.adapters.values()) == {SQL, CHAT}
    assert len(pins.lost) == 1
    assert pins.lost[0].startswith("feature/x: is no lock")


@pytest.mark.parametrize(
    "text",
    ["<<<<<<< a\n{}\n", "<<<<<<< a\n=======\n<<<<<<< b\n", "=======\n", "<<<<<<< a\n{}\n=======\n{}\n>>>>>>> b\n"],
    ids=["open", "twice", "middle alone", "no locks"],
)
def test_what_cannot_be_taken_apart_is_refused(text: str) -> None:
    with pytest.raises(HubkitError) as caught:
        rebuilt(text.encode(), "hubkit.lock")
    assert caught.value.code == "HK-JSON"
    assert caught.value.fix
