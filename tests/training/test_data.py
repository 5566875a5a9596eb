"""Rows from files and the choice of columns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hubkit.errors import HubkitError
from hubkit.training.rows.data import Columns, Record, choose_columns, read_rows, unused


def refused(code: str, call: Callable[..., object], *args: object) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        call(*args)
    assert caught.value.code == code
    return caught.value


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_same_rows_from_every_form(tmp_path: Path) -> None:
    rows = [{"q": 'a "b"\nc', "a": "x,y"}, {"q": "é\u2028", "a": ""}]
    forms = {
        "r.jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n",
        "r.json": json.dumps(rows, indent=1),
        "r.csv": 'q,a\r\n"a ""b""\nc","x,y"\r\né\u2028,\r\n',
        "r.tsv": 'q\ta\n"a ""b""\nc"\tx,y\né\u2028\t\n',
    }
    for name, text in forms.items():
        for mark in ("", "\ufeff"):
            assert [dict(record.values) for record in read_rows(write(tmp_path, name, mark + text))] == rows


def test_rows_say_where_they_stand(tmp_path: Path) -> None:
    assert [r.where for r in read_rows(write(tmp_path, "r.jsonl", '{"a":1}\n\n{"a":2}'))] == ["r.jsonl:1", "r.jsonl:3"]
    assert [r.where for r in read_rows(write(tmp_path, "r.json", '[{"a":1},{"a":2}]'))][1] == "r.json row 2"
    # a quoted field over two lines: the row is named by its last line
    assert [r.where for r in read_rows(write(tmp_path, "r.csv", 'a\n"x\ny"\nz\n'))] == ["r.csv:3", "r.csv:4"]


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": }\n', "r.jsonl:2"),
        ("r.jsonl", '{"a": 1}\n[1]\n', "r.jsonl:2"),
        ("r.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', "r.jsonl:3"),
        ("r.jsonl", "[" * 100_000, "r.jsonl:1"),
        ("r.json", '{"a": 1}', "r.json"),
        ("r.json", '[\n{"a": 1},\n{"a" 2}]', "r.json:3"),
        ("r.jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": "cut \\ud83d"}\n', "r.jsonl:2"),
        ("r.jsonl", '{"a": [{"b": "\\ude00"}]}\n', "r.jsonl:1"),
        ("r.jsonl", '{"\\udfff": 1}\n', "r.jsonl:1"),
        ("r.json", '[{"a": "\\u00e4"}, {"a": "\\uD800"}]', "r.json row 2"),
        ("r.csv", "a,b\n1,2\n1,2,3\n", "r.csv:3"),
        ("r.csv", 'a,b\n1,"2\n', "r.csv:2"),
        ("r.csv", "a,a\n1,2\n", "r.csv:1"),
        ("r.xlsx", "", "r.xlsx"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str | bytes, where: str) -> None:
    assert refused("HK-DATA", read_rows, write(tmp_path, name, content)).where == where


def test_a_number_of_more_digits_than_python_reads(tmp_path: Path) -> None:
    error = refused("HK-DATA", read_rows, write(tmp_path, "r.jsonl", '{"a": ' + "1" * 5000 + "}"))
    assert (error.where, error.want) == ("r.jsonl:1", ["JSON"])


def test_absent_and_empty_files(tmp_path: Path) -> None:
    refused("HK-MISSING", read_rows, tmp_path / "none.jsonl")
    for name, text in (("r.jsonl", "\n\n"), ("r.json", "[]"), ("r.csv", ""), ("s.csv", "a,b\n")):
        refused("HK-NO-ROWS", read_rows, write(tmp_path, name, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    for name in ("rows.jsonl", "loop.csv"):
        assert refused("HK-DATA", read_rows, tmp_path / name).where == str(tmp_path / name)


def test_a_field_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    text = "x" * (before + 1)
    assert read_rows(write(tmp_path, "r.csv", f"a\n{text}\n"))[0].values["a"] == text
    assert csv.field_size_limit() == before


def of(*names: str) -> list[Record]:
    return [Record(dict.fromkeys(names, "x"), "r:1")]


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("text", "id"), Columns(text="text")),
        (("messages",), Columns(messages="messages")),
        (("prompt", "prompt_id", "messages"), Columns(messages="messages")),
        (("question", "answer"), Columns(prompt=("question",), completion="answer")),
        (("prompt", "completion"), Columns(prompt=("prompt",), completion="completion")),
        (("instruction", "input", "output"), Columns(prompt=("instruction", "input"), completion="output")),
    ],
)
def test_usual_columns_are_found(names: tuple[str, ...], columns: Columns) -> None:
    assert choose_columns(of(*names)) == columns


def test_without_rows_there_are_no_columns() -> None:
    refused("HK-NO-ROWS", choose_columns, [])
    refused("HK-NO-ROWS", choose_columns, [], Columns(text="text"))


def test_unclear_columns_are_refused_with_the_choices() -> None:
    error = refused("HK-COLUMNS", choose_columns, of("text", "prompt", "answer"))
    assert error.have == ["columns text, prompt, answer", "could be: text", "could be: prompt, answer"]
    refused("HK-COLUMNS", choose_columns, of("mr", "ref"))
    refused("HK-COLUMNS", choose_columns, of("a", "b"), Columns(prompt=("a",)))
    refused("HK-COLUMNS", choose_columns, of("a", "b"), Columns(text="a", messages="b"))


def test_a_named_column_that_is_absent_is_refused_with_the_nearest() -> None:
    error = refused("HK-COLUMNS", choose_columns, of("question", "answer"), Columns(text="questoin"))
    assert error.have == ["r:1: no column 'questoin' (near: question)"]
    error = refused("HK-COLUMNS", choose_columns, [*of("text"), Record({"txt": ""}, "r:2")])
    assert error.have == ["r:2: no column 'text' (near: txt)"]


def test_only_the_first_faults_are_spelt_out() -> None:
    error = refused("HK-COLUMNS", choose_columns, of("a") * 500, Columns(text="b"))
    assert len(error.have) == 10
    assert error.have[-1] == "and 491 more"


PAIR = ("prompt", "completion")


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (
            [("instruction", "context", "response", "category")],
            Columns(prompt=("instruction", "context"), completion="response"),
        ),
        (
            [("system_prompt", "question", "response")],
            Columns(prompt=("question",), completion="response", system="system_prompt"),
        ),
        ([("conversations", "system", "tools")], Columns(messages="conversations", system="system", tools="tools")),
        (
            [("instruction", "output"), ("instruction", "input", "output"), ("instruction", "output", "history")],
            Columns(prompt=("instruction", "input"), completion="output", history="history"),
        ),
        (
            [("messages",), ("messages", "tools"), ("messages", "system")],
            Columns(messages="messages", system="system", tools="tools"),
        ),
    ],
)
def test_what_belongs_to_the_shape_is_found_in_whatever_row_it_stands(
    rows: list[tuple[str, ...]], columns: Columns
) -> None:
    records = [record for names in rows for record in of(*names)]
    assert choose_columns(records) == columns


def test_rows_of_several_shapes_are_refused() -> None:
    error = refused("HK-COLUMNS", choose_columns, [*of("messages"), *of("text"), *of(*PAIR), *of("text")])
    assert error.have == ["r:1: messages", "r:1: text", "r:1: prompt, completion"]
    refused("HK-COLUMNS", choose_columns, [*of(*PAIR, "system"), *of(*PAIR, "system_prompt")])


def test_preferences_are_refused_unless_the_columns_are_named() -> None:
    for names in (("chosen", "rejected"), ("prompt", "chosen", "rejected")):
        assert "preferences" in refused("HK-COLUMNS", choose_columns, of(*names)).what
    asked = Columns(prompt=("prompt",), completion="chosen")
    assert choose_columns(of("prompt", "chosen", "rejected"), asked) == asked
    labelled = [Record({"prompt": "x", "completion": "y", "label": False}, "r:1")]
    assert "preferences" in refused("HK-COLUMNS", choose_columns, labelled).what
    assert choose_columns(of(*PAIR, "label")) == Columns(prompt=("prompt",), completion="completion")


def test_pictures_are_refused_unless_the_columns_are_named() -> None:
    seen = [Record({"messages": [], "images": []}, "r:1"), Record({"messages": [], "images": ["x"]}, "r:2")]
    assert refused("HK-DATA", choose_columns, seen).have == ["r:2: images"]
    assert choose_columns(seen[:1]) == choose_columns(seen, Columns(messages="messages"))


def test_columns_that_look_like_content_and_are_not_used_are_said() -> None:
    records = [*of("text", "id"), *of("text", "answer", "title")]
    assert unused(records, Columns(text="text").names()) == ("answer", "title")


def test_a_named_column_that_rows_may_lack_stands_in_some_row() -> None:
    asked = Columns(prompt=("prompt",), completion="completion", system="sys")
    assert choose_columns([*of(*PAIR), *of(*PAIR, "sys")], asked) == asked
    assert "(near: syst)" in refused("HK-COLUMNS", choose_columns, of(*PAIR, "syst"), asked).have[0]
    refused("HK-COLUMNS", choose_columns, of("text", "sys"), Columns(text="text", system="sys"))
    refused("HK-COLUMNS", choose_columns, of("sys"), Columns(system="sys"))


def test_gzip_and_plain_lines(tmp_path: Path) -> None:
    rows = '{"text": "one"}\n{"text": "two"}\n'
    packed = read_rows(write(tmp_path, "r.jsonl.gz", gzip.compress(rows.encode())))
    assert packed == [Record({"text": "one"}, "r.jsonl.gz:1"), Record({"text": "two"}, "r.jsonl.gz:2")]
    lines = read_rows(write(tmp_path, "r.txt", " one\r\n\n two\u2028 \n"))
    assert lines == [Record({"text": " one"}, "r.txt:1"), Record({"text": " two\u2028 "}, "r.txt:3")]
    for broken in (b"plain", gzip.compress(rows.encode())[:-9]):
        assert refused("HK-DATA", read_rows, write(tmp_path, "b.jsonl.gz", broken)).where == "b.jsonl.gz"


def test_nul_characters_are_named_with_their_row(tmp_path: Path) -> None:
    for name, text in (
        ("r.jsonl", '{"a": "fine \\\\u0000"}\n{"a": [{"b": "x\\u0000"}]}\n'),
        ("r.csv", "a\nx\0\n"),
        ("r.txt", "one\ntwo\0\n"),
    ):
        error = refused("HK-DATA", read_rows, write(tmp_path, name, text))
        assert (error.where, "NUL" in error.have[0]) == (f"{name}:2", True)


def test_parquet_says_what_jsonl_says(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, object]] = [
        {
            "messages": [
                {"role": "user", "content": "ü"},
                {"role": "assistant", "content": None, "tool_calls": [{"x": 1}]},
            ],
            "tools": None,
        },
        {"messages": [{"role": "user", "content": "b", "weight": 0}], "tools": [{"y": ["z"]}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    plain = read_rows(write(tmp_path, "r.jsonl", "\n".join(map(json.dumps, rows))))
    found = read_rows(tmp_path / "r.parquet")
    assert [record.where for record in found] == ["r.parquet row 1", "r.parquet row 2"]
    present = [{name: value for name, value in record.values.items() if value is not None} for record in found]
    assert present == [{n: value for n, value in record.values.items() if value is not None} for record in plain]


def test_what_is_no_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for content in (b"", b"PAR1", b"PAR1" * 9):
        assert refused("HK-DATA", read_rows, write(tmp_path, "r.parquet", content)).where == "r.parquet"


def test_broken_text_in_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array([b"fine", b"cut \xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "r.parquet")
    error = refused("HK-DATA", read_rows, tmp_path / "r.parquet")
    assert (error.where, error.have) == ("r.parquet row 2", ["byte 0xff"])
