"""What every command shares: printing a result (for people or as one JSON document), and the common flags."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Any, TypeVar

import click

from hubkit.errors import HubkitError, escape

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")
_JSON = "hubkit.json"
SHOWN = 10
"""Lines of one field of an error that people are shown."""
_NARROW = 10
"""Characters of a column that is not made narrower."""
_lost: list[bool] = []
"""Not empty: standard output cannot be written to."""


def _remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_JSON] = value


def json_option(function: Function) -> Function:
    """Decorator: ``--json``. `emit` obeys it; the command's function does not see it."""
    text = "Print one JSON document on stdout; progress and notes go to stderr."
    option = click.option("--json", is_flag=True, expose_value=False, is_eager=True, callback=_remember, help=text)
    return option(function)


def dry_run_option(function: Function) -> Function:
    """Decorator: ``--dry-run``, passed to the function as `dry_run`."""
    return click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; do nothing.")(
        function
    )


def registry_option(function: Function) -> Function:
    """Decorator: ``--registry``, passed to the function as `registry` (None when not given)."""
    text = "Where repositories live, this time: a directory, a URL, or 'hf'. Default: as `hubkit config` says."
    return click.option("--registry", metavar="WHERE", help=text)(function)


def emit(result: Result, render: Callable[[Result], str]) -> None:
    """Print a verb's result on stdout: with ``--json`` one document, else what `render` makes of it for people.

    Args:
        result: a dataclass, mapping or list of them.
        render: the lines for people. Foreign text is escaped here, line by line; `render` need not do it.
    """
    if click.get_current_context().meta.get(_JSON):
        _write(_json(plain(result)))
        return
    text = "\n".join(escape(line) for line in render(result).split("\n"))
    if text:
        _write(text)


def note(text: str) -> None:
    """One line on stderr that is neither result nor error: a warning, what happens next."""
    print(escape(text), file=sys.stderr, flush=True)


def write_error(error: HubkitError, as_json: bool) -> int:
    """Print one refusal (stderr; with ``--json`` one document on stdout) and return its exit status."""
    if as_json and not _lost:
        try:
            _write(_json(error.as_json()))
            return error.status
        except OSError:  # full, or closed: then people are told
            give_up_stdout()
    with suppress(OSError):
        print(error.render(SHOWN, _coloured()), file=sys.stderr, flush=True)
    return error.status


def _coloured() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def give_up_stdout() -> None:
    """What is still held back for standard output is dropped, so that nothing fails on it a second time at the end."""
    _lost.append(True)
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain(value: Any) -> Any:
    """`value` as JSON's own types: dataclasses and documents become objects, paths text, non-finite floats null."""
    if hasattr(value, "to_document"):
        return plain(value.to_document())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), width: int | None = None) -> str:
    """Left-aligned columns two spaces apart; the last column is not padded, so lines end where text ends.

    Args:
        width: characters of a line: the widest columns lose the middle of their cells until it holds them.
    """
    lines = [[escape(str(cell)) for cell in row] for row in ([head, *rows] if head else rows)]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    while width is not None and sum(widths) + 2 * len(widths) - 2 > width and max(widths) > _NARROW:
        widths[widths.index(max(widths))] -= 1
    return "\n".join(
        "  ".join(_cut(cell, room).ljust(room) for cell, room in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def terminal_width() -> int | None:
    """Characters of a line, where standard output is a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _cut(cell: str, room: int) -> str:
    """A cell without its middle, where it is too long: references differ at both ends."""
    left = (room - 3) // 2
    return cell if len(cell) <= room else f"{cell[:left]}...{cell[len(cell) - (room - 3 - left) :]}"


def short(digest: str | None, length: int = 12) -> str:
    """The first hex digits of a digest or commit, enough to recognise it."""
    return (digest or "-").removeprefix("sha256:")[:length]


def _json(document: Any) -> str:
    """One JSON document in which no character can command a terminal or hide; ASCII where the stream takes no more."""
    narrow = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "") != "utf8"
    text = json.dumps(document, indent=2, ensure_ascii=narrow, allow_nan=False)
    if narrow or all(map(str.isprintable, text.split("\n"))):
        return text
    return "\n".join("".join(c if escape(c) == c else json.dumps(c)[1:-1] for c in line) for line in text.split("\n"))


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
