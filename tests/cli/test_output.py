"""Tables, sizes and plain JSON values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hubkit.cli.output import plain, short, table
from hubkit.documents.arguments import size


@dataclass(frozen=True)
class Inner:
    path: Path
    loss: float


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    names: frozenset[str]


def test_plain_makes_json_of_everything_a_verb_returns() -> None:
    value = Outer((Inner(Path("a/b"), float("nan")), Inner(Path("c"), 0.5)), frozenset({"y", "x"}))
    assert plain(value) == {
        "inner": [{"path": "a/b", "loss": None}, {"path": "c", "loss": 0.5}],
        "names": ["x", "y"],
    }


def test_size_is_three_digits() -> None:
    counts = (0, 831, 9_800_000, 269_060_552, 999_600)
    assert [size(count) for count in counts] == ["0 B", "831 B", "9.8 MB", "269 MB", "1 MB"]


def test_short_knows_digests_and_commits() -> None:
    assert short("sha256:" + "ab" * 32) == "abababababab"
    assert short("9f31c2e" * 6) == "9f31c2e9f31c"
    assert short(None) == "-"


def test_table_aligns_and_escapes() -> None:
    assert table([("a", "bb"), ("ccc\x1b", "d")], head=("X", "Y")) == "X        Y\na        bb\nccc\\x1b  d"
    assert table([]) == ""
