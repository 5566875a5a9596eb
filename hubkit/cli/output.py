"""What every command shares: printing a result (for people or as one JSON document), and the common flags."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeVar

import click

from hubkit.errors import HubkitError, escape

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")
_JSON = "hubkit.json"


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
    text = "Where repositories live: a directory, a URL, or 'hf'. Default: $HUBKIT_REGISTRY, else the Hugging Face Hub."
    return click.option("--registry", metavar="WHERE", help=text)(function)


def emit(result: Result, render: Callable[[Result], str]) -> None:
    """Print a verb's result on stdout: with ``--json`` one document, else what `render` makes of it for people.

    Args:
        result: a dataclass, mapping or list of them.
        render: the lines for people. Foreign text is escaped here, line by line; `render` need not do it.
    """
    if click.get_current_context().meta.get(_JSON):
        _write(json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False))
        return
    text = "\n".join(escape(line) for line in render(result).split("\n"))
    if text:
        _write(text)


def note(text: str) -> None:
    """One line on stderr that is neither result nor error: a warning, what happens next."""
    print(escape(text), file=sys.stderr, flush=True)


def write_error(error: HubkitError, as_json: bool) -> int:
    """Print one refusal (stderr; with ``--json`` one document on stdout) and return its exit status."""
    if as_json:
        _write(json.dumps(error.as_json(), indent=2, ensure_ascii=False))
    else:
        print(error.render(), file=sys.stderr, flush=True)
    return error.status


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


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Left-aligned columns two spaces apart; the last column is not padded, so lines end where text ends."""
    lines = [[escape(str(cell)) for cell in row] for row in ([head, *rows] if head else rows)]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def size(count: int) -> str:
    """A number of bytes for people: ``831 B``, ``9.8 MB`` (powers of 1000)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def short(digest: str | None, length: int = 12) -> str:
    """The first hex digits of a digest or commit, enough to recognise it."""
    return (digest or "-").removeprefix("sha256:")[:length]


def _write(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
