"""Results as Python shows them: short, nothing that a stranger's text can steer, tables in notebooks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import hubkit
from hubkit import Listed, Metrics, Trained
from hubkit.documents.shown import ROWS, WIDTH, Shown, Table
from hubkit.verbs.verify import Check, Verified

DIGEST = f"sha256:{'a' * 64}"
STORED = Table(
    [
        Listed("ana/chat@1", "adapter", ("main", "1.0.0"), DIGEST, 831, Path("/store/1")),
        Listed("ana/<b>", None, ()),
    ]
)


def test_a_result_is_a_line_for_each_field_that_says_something() -> None:
    metrics = Metrics(3, 1.0, 4, 0, 100, 20, 2.123456789, None, None, None, 3, False, 1.5)
    lines = repr(Trained(Path("chat"), DIGEST, "gain", 1234, metrics)).splitlines()
    assert lines[:6] == [
        "Trained",
        "  path        chat",
        f"  digest      {DIGEST}",
        "  method      gain",
        "  parameters  1234",
        "  metrics",
    ]
    assert "    loss             2.12346" in lines
    assert not any("None" in line for line in lines)


def test_records_inside_are_a_table_of_at_most_so_many_rows() -> None:
    checks = tuple(Check(f"check {number}", "word " * 100) for number in range(ROWS + 5))
    lines = repr(Verified("./a", Path("a"), DIGEST, "./b", checks, (), ())).splitlines()
    assert len(lines) < ROWS + 10
    assert lines[-1].strip() == "… 5 more"
    assert all(len(line) <= WIDTH + 20 for line in lines)


def test_a_strangers_text_is_escaped() -> None:
    @dataclass(frozen=True, repr=False)
    class Said(Shown):
        text: str
        names: tuple[str, ...]

    said = Said("one\ntwo \x1b[31m<b>", ("\x1b]0;x\x07",))
    assert repr(said).splitlines() == ["Said", "  text   one", "         two \\x1b[31m<b>", "  names  \\x1b]0;x\\x07"]
    assert "\x1b" not in said._repr_html_()
    assert "&lt;b&gt;" in said._repr_html_()


def test_a_table_is_a_tuple_with_a_head_and_rows() -> None:
    assert repr(STORED).splitlines() == [
        f"reference   kind     versions     digest{' ' * 67}size  path",
        f"ana/chat@1  adapter  main, 1.0.0  {DIGEST}  831   /store/1",
        "ana/<b>",
    ]
    shown = STORED._repr_html_()
    assert (shown.count("<tr>"), shown.count("<th "), shown.count("<td ")) == (3, 6, 12)
    assert "ana/&lt;b&gt;" in shown
    assert (STORED[0], STORED[1]) == STORED
    assert repr(Table()) == "()"
    assert Table()._repr_html_() == "<p>nothing</p>"


def test_lists_are_tables() -> None:
    assert isinstance(hubkit.methods(), Table)
    assert isinstance(hubkit.list(), Table)
    assert repr(hubkit.methods()).splitlines()[0].split() == ["name", "distribution", "version", "default"]


@pytest.mark.parametrize("name", [name for name in hubkit.VERBS if name not in ("methods", "serve")])
def test_what_a_verb_returns_prints_itself(name: str) -> None:
    function = getattr(hubkit, name)
    returned = getattr(function, "_verb", function).__annotations__["return"]
    for word in returned.split(" | "):
        kind = getattr(hubkit, word.removeprefix("tuple[").removesuffix(", ...]"))
        assert issubclass(kind, Shown)
        assert kind.__repr__ is Shown.__repr__
        assert fields(kind)
