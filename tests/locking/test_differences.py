"""What differs between two locks is said once each, both ways, and nothing is said of equal ones."""

from __future__ import annotations

import dataclasses

import pytest
from documents.test_lock import LOCK

from hubkit.documents.lock import Lock, LockedAdapter
from hubkit.documents.recipe import Policy
from hubkit.documents.schema import sha256
from hubkit.locking.differences import Moved, moves

SQL, CHAT = LOCK.adapters


def having(*adapters: LockedAdapter, **fields: object) -> Lock:
    return dataclasses.replace(LOCK, adapters=adapters or LOCK.adapters, **fields)  # type: ignore[arg-type]


def chat(**fields: object) -> Lock:
    return having(SQL, dataclasses.replace(CHAT, **fields))  # type: ignore[arg-type]


CASES = {
    "version": (chat(version="1.3.0", revision="d" * 40), "chat", "version", "1.3.0 (dddddddddddd)"),
    "commit": (chat(revision="d" * 40), "chat", "commit", "1.2.3 (dddddddddddd)"),
    "content": (chat(digest=sha256(b"x")), "chat", "content", sha256(b"x")[7:19]),
    "source": (chat(source="ana/chat@^2"), "chat", "source", "ana/chat@^2"),
    "weight": (chat(weight=0.1), "chat", "weight", "0.1"),
    "license": (chat(license="MIT"), "chat", "license", "MIT"),
    "removed": (having(CHAT), "sql", "removed", ""),
    "order": (having(CHAT, SQL), "order", "setting", "chat, sql"),
    "mix": (having(mix="sum"), "mix", "setting", "sum"),
    "targets": (having(targets={"vllm": {"n": 1}}), "targets.vllm", "setting", '{"n": 1}'),
    "policy": (having(policy=Policy(("MIT",))), "policy", "setting", '{"licenses": ["MIT"]}'),
    "base": (
        having(base=dataclasses.replace(LOCK.base, revision="d" * 40)), "base", "commit", "dddddddddddd"
    ),
    "tokenizer": (having(base=dataclasses.replace(LOCK.base, files=LOCK.base.files[:1])), "base", "content", None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_difference_is_said_once_and_both_ways(name: str) -> None:
    other, entry, what, after = CASES[name]
    (found,) = moves(LOCK, other)
    assert (found.name, found.what) == (entry, what)
    assert after is None or found.after == after
    assert found.before != found.after
    (back,) = moves(other, LOCK)
    assert (back.before, back.after) == (found.after, found.before)


def test_equal_locks_differ_in_nothing() -> None:
    assert moves(LOCK, LOCK) == ()
    assert moves(LOCK, having(recipe=sha256(b"other words"))) == ()


def test_several_are_said_in_the_order_of_the_mix() -> None:
    new = dataclasses.replace(SQL, name="new", version="0.1.0")
    found = moves(LOCK, having(dataclasses.replace(CHAT, weight=2.0), new))
    digest = new.digest.removeprefix("sha256:")[:12]
    assert [(one.name, one.what, one.before, one.after) for one in found] == [
        ("chat", "weight", "1", "2"),
        ("new", "added", "", f"0.1.0 ({digest})"),
        ("sql", "removed", digest, ""),
    ]
    assert isinstance(found[0], Moved)
