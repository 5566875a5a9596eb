"""Files of rows, and what each kind of them holds: JSONL, JSON, CSV, TSV, Parquet, plain lines, each also gzipped."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit.errors import HubkitError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Files that name their columns."""
LINES = ".txt"
"""A file of plain lines: each that is not blank is a row with the column ``text``."""
PACKED = ".gz"
EXTRA = "pip install 'hubkit-adapters[data]'"

_CSV_LIMIT = threading.Lock()


@dataclass(frozen=True)
class Record:
    """One row of a data file: its columns by name, and where it stands ("data.jsonl:17")."""

    values: Mapping[str, object]
    where: str


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in small letters: ``.csv`` of ``rows.CSV.gz``."""
    name = path.name.lower()
    return Path(name.removesuffix(PACKED)).suffix


def read_file(path: Path) -> list[Record]:
    """The rows of one file, in its order; blank lines of JSONL and text are skipped.

    Raises:
        HubkitError: HK-MISSING; HK-DATA for an unknown suffix, wrong encoding, broken JSON, CSV, Parquet or gzip, half
            of a character or a NUL, at file:line; HK-EXTRA for Parquet without pyarrow; HK-NO-ROWS for a file without
            rows.
    """
    kind, name = kind_of(path), path.name
    if path.is_dir():
        base = (path / "config.json").is_file()
        fix = f"hubkit train {path} ROWS: the base comes first" if base else f"datasets:{path} for a data set in it"
        raise fault(str(path), _wanted(), "a base" if base else "a folder", fix)
    if kind not in (*SUFFIXES, LINES):
        raise fault(name, _wanted(), kind or "no suffix")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise HubkitError("HK-MISSING", "the file of rows is not there", where=str(path)) from None
    except OSError as error:
        raise HubkitError("HK-DATA", "the training data cannot be read", where=str(path), have=str(error)) from None
    if name.lower().endswith(PACKED):
        data = _unpacked(data, name)
    rows = list(_read_parquet(data, name) if kind == ".parquet" else _read_text(_decode(data, name), kind, name))
    if not rows:
        raise HubkitError("HK-NO-ROWS", "the training data has no rows", where=name, want="at least one row")
    return rows


def _wanted() -> str:
    return f"a file ending in {' '.join((*SUFFIXES, LINES))}, or one of these and {PACKED}"


def fault(where: str, want: str, have: str | Sequence[str], fix: str = "") -> HubkitError:
    """``HK-DATA``: the training data cannot be read."""
    return HubkitError("HK-DATA", "the training data cannot be read", where=where, want=want, have=have, fix=fix)


def _unpacked(data: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise fault(name, "a gzip file", str(error), "pack it again, or take the suffix away") from None


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        have = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise fault(f"{name}:{line}", "UTF-8 text", have, "convert the file to UTF-8") from None


def _read_text(text: str, kind: str, name: str) -> Iterator[Record]:
    if kind in (".csv", ".tsv"):
        return _read_csv(text, name, "\t" if kind == ".tsv" else ",")
    if kind == LINES:
        return _read_lines(text, name)
    return _read_json(text, name) if kind == ".json" else _read_jsonl(text, name)


def _read_lines(text: str, name: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield record({"text": line.removesuffix("\r")}, f"{name}:{number}", "\0" in line)


def _read_jsonl(text: str, name: str) -> Iterator[Record]:
    # split("\n"), not splitlines(): U+2028 and form feeds are ordinary characters inside JSON strings
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield record(_parse(line, name, number), f"{name}:{number}", "\\u" in line)


def _parse(text: str, name: str, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{name}:{line + error.lineno - 1}"
        raise fault(where, "JSON", f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise fault(f"{name}:{line}", "JSON", "values nested too deeply") from None
    except ValueError as error:
        raise fault(f"{name}:{line}", "JSON", str(error)) from None


def record(value: object, where: str, doubtful: bool) -> Record:
    """One row, if it is one.

    Args:
        doubtful: that it may hold what is no text: half of a pair of characters written as ``\\uXXXX``, or NUL.

    Raises:
        HubkitError: HK-DATA.
    """
    if not isinstance(value, dict):
        raise fault(where, "an object with named columns", _kind(value))
    have = [] if not doubtful else [f"{why} in column {n!r}" for n, c in value.items() if (why := _broken([n, c]))]
    if have:
        raise fault(where, "Unicode text", have, "write whole characters, or remove the row: it was cut or misread")
    return Record(value, where)


def _broken(value: object) -> str:
    """What is no text in a value; empty where all is."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return "a NUL character" if "\\u0000" in text and "\0" in _flat(value) else ""


def _flat(value: object) -> str:
    if isinstance(value, Mapping):
        return "".join(_flat([key, item]) for key, item in value.items())
    return "".join(map(_flat, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


def _read_json(text: str, name: str) -> Iterator[Record]:
    value = _parse(text, name, 1)
    if not isinstance(value, list):
        raise fault(name, "a list of objects", _kind(value), "one object per line belongs in a .jsonl file")
    for number, row in enumerate(value, start=1):
        yield record(row, f"{name} row {number}", "\\u" in text)


def _read_csv(text: str, name: str, delimiter: str) -> Iterator[Record]:
    # the limit on a field's length is global to the csv module and by default below the length of long texts
    with _CSV_LIMIT:
        before = csv.field_size_limit(sys.maxsize)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            lines = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise fault(f"{name}:{reader.line_num}", "CSV", str(error)) from None
        finally:
            csv.field_size_limit(before)
    if not lines:
        return
    header = lines[0][1]
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise fault(f"{name}:1", "a header of distinct names", [f"{column!r} stands there twice" for column in twice])
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise fault(f"{name}:{number}", f"{len(header)} fields", f"{len(row)} fields")
        yield record(dict(zip(header, row, strict=True)), f"{name}:{number}", "\0" in text)


def _read_parquet(data: bytes, name: str) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise HubkitError("HK-EXTRA", "Parquet needs pyarrow, which is not installed", where=name, fix=EXTRA) from None
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise fault(name, "Parquet", " ".join(str(error).split())[:300]) from None
    return rows_of_table(table, name, 0)


def rows_of_table(table: Any, name: str, before: int) -> Iterator[Record]:
    """The rows of an Arrow table.

    Args:
        before: rows of the same data that came before this table.
    """
    try:
        values = table.to_pylist()
    except UnicodeDecodeError:
        values = [_one_row(table, number, name, before) for number in range(table.num_rows)]
    return rows_of_values(values, name, before)


def rows_of_values(values: Iterable[Any], name: str, before: int) -> Iterator[Record]:
    """Rows out of Arrow; what is absent inside of a value is left out, as it was before Arrow filled it in."""
    for number, row in enumerate(values, start=before + 1):
        yield record({column: _without_none(v) for column, v in row.items()}, f"{name} row {number}", True)


def _one_row(table: Any, number: int, name: str, before: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = table.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        have = f"byte 0x{error.object[error.start]:02x}"
        raise fault(f"{name} row {before + number + 1}", "UTF-8 text", have, "convert the text to UTF-8") from None
    return found


def _without_none(value: Any) -> Any:
    """Arrow gives every object all fields that some object has: those without a value go, but a message's text."""
    if isinstance(value, dict):
        kept = {key: _without_none(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None or (key == "content" and "role" in kept)}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
