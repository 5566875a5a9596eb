"""``hubkit.lock``: same lock, same bytes; strict; merges line by line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit.documents.lock import Lock, LockedAdapter, LockedBase, LockedFile, pretty
from hubkit.documents.manifest import BaseFingerprint
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
DIGESTS = st.binary(max_size=4).map(sha256)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
DIGEST = sha256(b"")
BASE = BaseFingerprint("org/base", "a" * 40, DIGEST, DIGEST, {"model.safetensors": DIGEST}, {"layers": 2}, DIGEST, None)
FILES = (LockedFile("a", 1, DIGEST), LockedFile("b/c", 2, DIGEST))
LOCK = Lock(
    base=LockedBase("org/base", "a" * 40, BASE, FILES),
    adapters=(
        LockedAdapter("sql", "./sql", None, None, DIGEST, -0.5, FILES),
        LockedAdapter("chat", "ana/chat@^1.2", "b" * 40, "1.2.3", DIGEST, 1.0, FILES),
    ),
    mix="stack",
    recipe=DIGEST,
    overrides=("allow-base-mismatch",),
)
ADAPTERS = st.builds(
    LockedAdapter,
    NAMES,
    TEXT.filter(bool),
    st.none() | st.just("c" * 40),
    st.none() | st.just("1.0.0"),
    DIGESTS,
    st.floats(-9, 9) | st.integers(-9, 9),
    st.sampled_from([(), FILES]),
)
LOCKS = st.builds(
    Lock,
    st.just(LOCK.base),
    st.lists(ADAPTERS, max_size=4, unique_by=lambda one: one.name).map(tuple),
    st.sampled_from(["sum", "stack"]),
    DIGESTS,
    targets=st.dictionaries(NAMES, st.dictionaries(NAMES, st.booleans() | st.integers(-9, 9) | TEXT), max_size=2),
)


@settings(max_examples=40, deadline=None)
@given(LOCKS)
def test_a_lock_survives_writing_and_reading(lock: Lock) -> None:
    data = lock.to_bytes()
    again = Lock.from_bytes(data)
    assert again == lock
    assert again.to_bytes() == data
    assert again.digest == lock.digest


def test_the_bytes_are_sorted_indented_and_end_with_a_newline() -> None:
    text = LOCK.to_bytes().decode()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert "\r" not in text
    assert [one["name"] for one in json.loads(text)["adapters"]] == ["sql", "chat"]


def test_targets_are_kept_and_none_leave_no_key() -> None:
    """So the digests of locks without targets stay what they were."""
    targets = {"vllm": {"max_loras": 4, "serve": "each"}}
    again = Lock.from_bytes(dataclasses.replace(LOCK, targets=targets).to_bytes())
    assert again.targets == targets
    assert again.digest != LOCK.digest
    assert "targets" not in LOCK.to_document()


def test_the_order_of_files_does_not_matter_that_of_adapters_does() -> None:
    turned = dataclasses.replace(LOCK, base=dataclasses.replace(LOCK.base, files=FILES[::-1]))
    assert turned.to_bytes() == LOCK.to_bytes()
    assert dataclasses.replace(LOCK, adapters=LOCK.adapters[::-1]).digest != LOCK.digest


@pytest.mark.parametrize("place", [(), ("base",), ("adapters", 0), ("adapters", 1, "files", 0)])
def test_unknown_fields_are_refused(place: tuple[str | int, ...]) -> None:
    document = LOCK.to_document()
    inner: Any = document
    for step in place:
        inner = inner[step]
    inner["wieght"] = 2
    with pytest.raises(HubkitError) as caught:
        Lock.from_bytes(json.dumps(document).encode())
    assert caught.value.code == "HK-SCHEMA"
    assert "'wieght' was unexpected" in str(caught.value)


@pytest.mark.parametrize(("old", "new"), [('"b' + "b" * 39, '"main'), ("sha256:", "md5:"), ('"stack"', '"route"')])
def test_what_does_not_pin_is_refused(old: str, new: str) -> None:
    with pytest.raises(HubkitError, match="HK-SCHEMA"):
        Lock.from_bytes(LOCK.to_bytes().decode().replace(old, new).encode())


def test_an_adapter_is_locked_once() -> None:
    double = dataclasses.replace(LOCK, adapters=LOCK.adapters + LOCK.adapters[:1])
    with pytest.raises(HubkitError, match="locked twice"):
        Lock.from_bytes(double.to_bytes())


def test_a_newer_lock_is_refused() -> None:
    with pytest.raises(HubkitError, match="HK-NEWER"):
        Lock.from_bytes(LOCK.to_bytes().replace(b"hubkit/lock/1", b"hubkit/lock/2"))


def test_nothing_unreadable_is_written(tmp_path: Path) -> None:
    for bad in (dataclasses.replace(LOCK, recipe="main"), dataclasses.replace(LOCK, overrides=("hf_" + "a" * 34,))):
        with pytest.raises(HubkitError):
            bad.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_read_and_write_take_the_file_or_its_folder(tmp_path: Path) -> None:
    with pytest.raises(HubkitError, match="HK-MISSING"):
        Lock.read(tmp_path)
    LOCK.write(tmp_path)
    assert Lock.read(tmp_path / "hubkit.lock") == Lock.read(tmp_path) == LOCK


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_merges_changes_of_two_adapters_and_conflicts_are_named(tmp_path: Path) -> None:
    sql, chat = LOCK.adapters
    versions = {
        "base": LOCK,
        "ours": dataclasses.replace(LOCK, adapters=(dataclasses.replace(sql, digest=sha256(b"1")), chat)),
        "theirs": dataclasses.replace(LOCK, adapters=(sql, dataclasses.replace(chat, digest=sha256(b"2")))),
        "clash": dataclasses.replace(LOCK, adapters=(dataclasses.replace(sql, digest=sha256(b"3")), chat)),
    }
    for name, lock in versions.items():
        (tmp_path / name).write_bytes(lock.to_bytes())
    merge = ["git", "merge-file", "-p", "ours", "base"]
    merged = subprocess.run([*merge, "theirs"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert [one.digest for one in Lock.from_bytes(merged).adapters] == [sha256(b"1"), sha256(b"2")]
    clash = subprocess.run([*merge, "clash"], cwd=tmp_path, capture_output=True, check=False).stdout
    with pytest.raises(HubkitError, match="merge conflicts") as caught:
        Lock.from_bytes(clash)
    assert "hubkit lock" in caught.value.fix


@pytest.mark.parametrize("path", ["../../.bashrc", "/etc/passwd", "a/../../b", "c:\\x", "a\nb"])
def test_a_file_outside_its_folder_is_refused(path: str) -> None:
    """A deployment copies what is locked by these names."""
    document = LOCK.to_document()
    for part in (document["base"], document["adapters"][1]):
        sound, part["files"] = part["files"], [{**part["files"][0], "path": path}]
        with pytest.raises(HubkitError) as caught:
            Lock.from_bytes(json.dumps(document).encode())
        assert caught.value.code == "HK-NAME"
        part["files"] = sound
    Lock.from_bytes(json.dumps(document).encode(), any_layout=True)


def edited(data: bytes) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        Lock.from_bytes(data)
    return caught.value


@settings(max_examples=200)
@given(st.data())
def test_one_changed_byte_anywhere_is_seen(data: st.DataObject) -> None:
    """Whoever reads a lock refuses it; its layout is part of it, for the bytes of a deployment are compared."""
    sound = LOCK.to_bytes()
    at = data.draw(st.integers(0, len(sound) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != sound[at]))
    assert edited(sound[:at] + bytes([byte]) + sound[at + 1 :]).code in (
        "HK-LOCK-EDITED", "HK-SCHEMA", "HK-JSON", "HK-NEWER", "HK-NAME")  # fmt: skip


@settings(max_examples=60)
@given(LOCKS, st.data())
def test_an_edited_value_is_seen_in_any_layout(lock: Lock, data: st.DataObject) -> None:
    """The seals are of the content: sorting and indenting it anew does not hide an edit."""
    document = json.loads(lock.to_bytes())
    places = [document, document["base"], *document["adapters"]]
    place = data.draw(st.sampled_from(places))
    name = data.draw(st.sampled_from(sorted({"source", "weight", "revision", "mix", "recipe", "seal"} & place.keys())))
    old = place[name]
    place[name] = old + 0.25 if isinstance(old, float | int) else "".join(reversed(old))
    if place[name] == old:
        return
    text = json.dumps(document).encode()
    with pytest.raises(HubkitError) as caught:
        Lock.from_bytes(text, any_layout=True)
    assert caught.value.code in ("HK-LOCK-EDITED", "HK-SCHEMA")


def test_an_entry_without_its_seal_is_seen() -> None:
    document = json.loads(LOCK.to_bytes())
    del document["adapters"][1]["seal"]
    document["adapters"][1]["weight"] = 7
    assert edited(json.dumps(document).encode()).have == ["adapters/chat: no seal"]


def test_locks_of_the_first_release_have_no_seals_and_are_read() -> None:
    old = pretty(LOCK.to_document(), "lock")
    assert b"seal" not in old
    assert Lock.from_bytes(old) == LOCK
    assert Lock.from_bytes(old).digest == LOCK.digest


def test_another_layout_is_refused_with_what_mends_it() -> None:
    sound = LOCK.to_bytes()
    error = edited(sound.replace(b"\n", b"\r\n"))
    assert (error.code, error.have) == ("HK-LOCK-EDITED", ["lines that end in CRLF"])
    assert ".gitattributes" in error.fix
    assert edited(json.dumps(json.loads(sound)).encode()).fix == "hubkit lock writes it anew"
    assert Lock.from_bytes(sound.replace(b"\n", b"\r\n"), any_layout=True) == LOCK


def test_a_lock_that_contradicts_itself_is_refused() -> None:
    """Also one without seals, which somebody may have put together by hand."""
    chat = LOCK.adapters[1]
    files = (*chat.files, LockedFile("hubkit.json", 1, sha256(b"another")))
    wrong = dataclasses.replace(LOCK, adapters=(dataclasses.replace(chat, files=files),))
    base = dataclasses.replace(LOCK.base, files=(LockedFile("model.safetensors", 1, sha256(b"x")),))
    for lock, word in ((wrong, "adapters/chat"), (dataclasses.replace(LOCK, base=base), "base: its fingerprint")):
        assert edited(pretty(lock.to_document(), "lock")).have[0].startswith(word)
        assert edited(lock.to_bytes()).have[0].startswith(word)
