"""Training rows as people have them: JSONL, JSON, CSV and TSV files, and which of their columns are meant."""

from __future__ import annotations

import csv
import io
import json
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubkit.errors import HubkitError, nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TEXTS = ("text",)
CHATS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
COMPLETIONS = ("completion", "response", "answer", "output", "target")
SHOWN = 10
"""Faults of one kind that a refusal spells out; the rest are counted."""

_CSV_LIMIT = threading.Lock()
_NAME_THEM = "name them: --text COLUMN, or --messages COLUMN, or --prompt COLUMN --completion COLUMN"


@dataclass(frozen=True)
class Record:
    """One row of a data file: its columns by name, and where it stands ("data.jsonl:17")."""

    values: Mapping[str, object]
    where: str


@dataclass(frozen=True)
class Columns:
    """The columns to train on: `text`, or `messages`, or `prompt` (joined by blank lines) with `completion`.

    Empty fields are found from the data by `choose_columns`.
    """

    text: str | None = None
    messages: str | None = None
    prompt: tuple[str, ...] = ()
    completion: str | None = None

    def names(self) -> list[str]:
        """All columns named, in a fixed order."""
        return [n for n in (self.text, self.messages, *self.prompt, self.completion) if n]


def read_rows(path: Path) -> list[Record]:
    """The rows of one file, in its order; blank lines of JSONL are skipped.

    Raises:
        HubkitError: HK-MISSING; HK-DATA for an unknown suffix, wrong encoding, bad JSON or CSV, half of a character, at
            file:line; HK-NO-ROWS for a file without rows.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        base = (path / "config.json").is_file()
        fix = f"hubkit train {path} ROWS: the base comes first" if base else f"hubkit train BASE {path}/ROWS.jsonl"
        raise _fault(str(path), f"a file ending in {' '.join(SUFFIXES)}", "a base" if base else "a folder", fix)
    if suffix not in SUFFIXES:
        raise _fault(path.name, f"a file ending in {' '.join(SUFFIXES)}", suffix or "no suffix")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise HubkitError("HK-MISSING", "the training data is not there", where=str(path)) from None
    except OSError as error:
        raise HubkitError("HK-DATA", "the training data cannot be read", where=str(path), have=str(error)) from None
    text = _decode(data, path.name)
    if suffix in (".csv", ".tsv"):
        rows = list(_read_csv(text, path.name, "\t" if suffix == ".tsv" else ","))
    else:
        rows = list(_read_json(text, path.name) if suffix == ".json" else _read_jsonl(text, path.name))
    if not rows:
        raise HubkitError("HK-NO-ROWS", "the training data has no rows", where=path.name, want="at least one row")
    return rows


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        have = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise _fault(f"{name}:{line}", "UTF-8 text", have, "convert the file to UTF-8") from None


def _fault(where: str, want: str, have: str | Sequence[str], fix: str = "") -> HubkitError:
    return HubkitError("HK-DATA", "the training data cannot be read", where=where, want=want, have=have, fix=fix)


def _read_jsonl(text: str, name: str) -> Iterator[Record]:
    # split("\n"), not splitlines(): U+2028 and form feeds are ordinary characters inside JSON strings
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _record(_parse(line, name, number), f"{name}:{number}", "\\u" in line)


def _parse(text: str, name: str, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{name}:{line + error.lineno - 1}"
        raise _fault(where, "JSON", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise _fault(f"{name}:{line}", "JSON", "values nested too deeply") from None
    except ValueError as error:
        raise _fault(f"{name}:{line}", "JSON", str(error)) from None


def _record(value: object, where: str, escaped: bool) -> Record:
    """One row; `escaped`: characters may be written as ``\\uXXXX``, and half of a pair of them is no text."""
    if not isinstance(value, dict):
        raise _fault(where, "an object with named columns", _kind(value))
    if escaped and (broken := [name for name, column in value.items() if not _is_text([name, column])]):
        have = [f"half of a surrogate pair in column {name!r}" for name in broken]
        raise _fault(where, "Unicode text", have, "write whole characters, or remove the row: it was cut inside of one")
    return Record(value, where)


def _is_text(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_json(text: str, name: str) -> Iterator[Record]:
    value = _parse(text, name, 1)
    if not isinstance(value, list):
        raise _fault(name, "a list of objects", _kind(value), "one object per line belongs in a .jsonl file")
    for number, row in enumerate(value, start=1):
        yield _record(row, f"{name} row {number}", "\\u" in text)


def _read_csv(text: str, name: str, delimiter: str) -> Iterator[Record]:
    # the limit on a field's length is global to the csv module and by default below the length of long texts
    with _CSV_LIMIT:
        before = csv.field_size_limit(sys.maxsize)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            lines = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise _fault(f"{name}:{reader.line_num}", "CSV", str(error)) from None
        finally:
            csv.field_size_limit(before)
    if not lines:
        return
    header = lines[0][1]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise _fault(f"{name}:1", "a header of distinct names", [f"{column!r} stands there twice" for column in twice])
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise _fault(f"{name}:{number}", f"{len(header)} fields", f"{len(row)} fields")
        yield Record(dict(zip(header, row, strict=True)), f"{name}:{number}")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def choose_columns(records: Sequence[Record], asked: Columns | None = None) -> Columns:
    """The columns to train on: those asked for, or the one usual choice that the first row offers.

    Raises:
        HubkitError: HK-NO-ROWS; HK-COLUMNS when a named column is absent from any row, when nothing usual is
            there, when two choices are, or when `asked` is no complete choice.
    """
    if not records:
        raise HubkitError("HK-NO-ROWS", "there are no rows to train on", want="at least one row")
    present = list(records[0].values)
    columns = asked if asked is not None and asked.names() else _detect(present, records[0].where)
    _check_choice(columns)
    faults = [
        f"{record.where}: no column {name!r}" + _hint(name, record.values)
        for record in records
        for name in columns.names()
        if name not in record.values
    ]
    if faults:
        where = records[0].where.partition(":")[0]
        raise HubkitError(
            "HK-COLUMNS",
            "rows lack a column that is to be trained on",
            where=where,
            want=f"{', '.join(columns.names())} in every row",
            have=shorten(faults),
            fix=_NAME_THEM,
        )
    return columns


def _detect(present: Sequence[str], where: str) -> Columns:
    found: list[Columns] = [Columns(text=name) for name in TEXTS if name in present]
    found += [Columns(messages=name) for name in CHATS if name in present]
    prompts: list[tuple[str, ...]] = [(name,) for name in PROMPTS if name in present]
    if prompts == [("instruction",), ("input",)]:  # the Alpaca form: a task and what it is applied to
        prompts = [("instruction", "input")]
    completions = [name for name in COMPLETIONS if name in present]
    found += [Columns(prompt=prompt, completion=completion) for prompt in prompts for completion in completions]
    if len(found) == 1:
        return found[0]
    have = [f"columns {', '.join(present) or 'none'}"]
    have += [f"could be: {', '.join(choice.names())}" for choice in found]
    raise _no_columns("text, or messages, or prompt and completion", have, where)


def _check_choice(columns: Columns) -> None:
    kinds = [bool(columns.text), bool(columns.messages), bool(columns.prompt or columns.completion)]
    if sum(kinds) != 1 or bool(columns.prompt) != bool(columns.completion):
        raise _no_columns("text, or messages, or prompt and completion", ", ".join(columns.names()), "flags")


def _no_columns(want: str, have: str | Sequence[str], where: str) -> HubkitError:
    return HubkitError(
        "HK-COLUMNS", "the columns to train on are not clear", where=where, want=want, have=have, fix=_NAME_THEM
    )


def _hint(name: str, present: Iterable[str]) -> str:
    near = nearest(name, present)
    return f" (near: {', '.join(near)})" if near else f" (there are: {', '.join(present) or 'none'})"


def shorten(faults: Sequence[str]) -> list[str]:
    """`faults` as a refusal shows them: the first `SHOWN`, then how many more there are."""
    rest = len(faults) - SHOWN
    return [*faults[:SHOWN], *([f"and {rest} more"] if rest > 0 else [])]
