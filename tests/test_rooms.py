"""Rooms import one way and stay small: what `scripts/rooms` reads from the imports, and the picture it draws."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
BY_COMMAND = ("verbs", "cli")
"""Rooms with one file per command."""
MOST, LONGEST = 16, 350


def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("rooms", str(ROOT / "scripts" / "rooms"))
    spec = importlib.util.spec_from_loader("rooms", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


rooms = script()


@pytest.mark.parametrize("types", [False, True])
def test_nothing_imports_in_a_circle(types: bool) -> None:
    """Neither modules nor rooms, at run time and for type checkers, late imports too."""
    known = rooms.sound(rooms.graph(types=types))
    assert rooms.circles(known) == []
    assert rooms.circles(rooms.rooms(known)) == []


def test_imports_that_go_up_are_there_and_no_more() -> None:
    known = rooms.graph(types=True)
    for low, high in rooms.UPWARD:
        assert any(other.startswith(high) for other in known[low]), f"{low} no longer imports {high}: take it off"


def test_a_circle_would_be_seen() -> None:
    """What these tests rest on."""
    line = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset[str]()}
    assert rooms.circles(line) == []
    assert rooms.circles({**line, "c": frozenset({"a"})}) == [["a", "b", "c"]]
    assert rooms.reduced({**line, "a": frozenset({"b", "c"})}) == [("a", "b"), ("b", "c")]


def test_a_room_has_few_files_and_a_file_few_lines() -> None:
    for folder in {path.parent for path in rooms.modules().values()}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST or folder.name in BY_COMMAND, folder
        for path in files:
            lines = path.read_text("utf-8").count("\n")
            assert lines <= LONGEST, f"{path.relative_to(ROOT)}: {lines} lines"


def test_the_picture_in_architecture_md_is_that_of_the_code() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    shown = text.partition("```mermaid\n")[2].partition("```")[0]
    assert shown == rooms.picture(), "scripts/rooms --picture"


def test_every_room_says_what_is_in_it() -> None:
    for path in rooms.modules().values():
        if path.name == "__init__.py":
            assert path.read_text("utf-8").startswith('"""'), path


def test_every_room_is_in_the_wheel() -> None:
    """A folder that the list leaves out is missing for whoever installs hubkit, and in no test."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    rooms = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "hubkit").rglob("__init__.py")
    }
    assert rooms | {"hubkit.plugins", "hubkit.schemas"} == set(listed)
