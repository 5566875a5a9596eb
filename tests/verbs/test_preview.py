"""preview and ``train --dry-run``: rows as the model sees them; the same rows that train takes, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from variants import refused, say, tree

from hubkit.training.rows.summary import Prepared
from hubkit.verbs.preview import preview
from hubkit.verbs.train import train

ROWS = [
    {"instruction": "When?", "context": f"It began in {year}.", "response": f"In {year}.", "category": "x"}
    for year in (*range(1990, 2000), 1999)
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "dolly.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_what_is_shown_is_what_is_trained_on(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    told: list[Prepared] = []

    def report(event: object) -> None:
        told.extend([event] if isinstance(event, Prepared) else [])

    options: dict[str, Any] = {"validation": 0.3, "seed": 4, "duplicates": "drop", "max_length": 64}
    train(tiny_llama, rows, tmp_path / "out", steps=1, report=report, **options)
    shown = preview(tiny_llama, rows, rows=2, steps=1, **options)
    assert told == [shown.figures]
    assert shown.figures.columns == {"prompt": ("instruction", "context"), "completion": ("response",)}
    assert (shown.figures.rows, shown.figures.validation_rows, shown.figures.dropped) == (7, 3, 1)
    assert len(shown.rows) == 2
    for row in shown.rows:
        record = ROWS[int(row.where.rpartition(":")[2]) - 1]
        assert record["context"] in row.text("", "")
        assert "".join(piece.text for piece in row.pieces if piece.learnt).startswith(record["response"])


def test_nothing_is_written_and_no_weights_are_needed(
    tiny_llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    before = tree(tmp_path)
    texts = [say(capsys, "train", base, rows, "--dry-run", 1).out for base in (tiny_llama, bare)]
    assert texts[0] == texts[1]
    assert "prompt = instruction + context" in texts[0]
    assert texts[0].count("dolly.jsonl:") == 1
    assert "[[In 1990." in texts[0]
    found = json.loads(say(capsys, "train", tiny_llama, rows, "--dry-run", "--json").out)
    assert (found["figures"]["duplicates"], len(found["rows"])) == (1, 3)
    assert tree(tmp_path) == before


def test_virtual_tokens_take_their_room_in_a_preview_too(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    texts = tmp_path / "long.jsonl"
    texts.write_text(json.dumps({"text": "word " * 400}))
    longest = preview(tiny_llama, texts, truncate=True).figures.tokens.most
    front = preview(
        tiny_llama, texts, truncate=True, method="prompt", config={"num_virtual_tokens": 7}
    ).figures.tokens.most
    assert longest - front == 7
    assert refused("HK-OPTIONS", preview, tiny_llama, rows, max_length=99999)


def test_a_run_begins_with_the_figures(
    tiny_llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = say(capsys, "train", tiny_llama, rows, "-o", tmp_path / "out", "--steps", 1)
    assert "prompt = instruction + context, completion = response" in said.err
    assert "rows that were there before: 1" in said.err


def test_without_out_there_must_be_a_dry_run(tiny_llama: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = say(capsys, "train", tiny_llama, rows)
    assert said.refusal(2) == "HK-USAGE"
    assert "--out" in said.err


def test_validation_data_that_is_trained_on(
    tiny_llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(ROWS[3]))
    before = tree(tmp_path)
    line = ("train", tiny_llama, rows, "-o", tmp_path / "out", "--steps", 1, "--validation-data", held)
    said = say(capsys, *line)
    assert said.refusal() == "HK-DATA"
    assert "dolly.jsonl:4 is held.jsonl:1" in said.err
    assert "--overlap drop" in said.err
    assert tree(tmp_path) == before
    assert "rows that are validated on: 1 (dropped)" in say(capsys, *line, "--overlap", "drop").err


def test_the_manifest_says_which_data_set_it_was(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    library.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    made = [
        json.loads((train(tiny_llama, data, tmp_path / name, steps=1).path / "hubkit.json").read_text())["training"]
        for name, data in (("a", rows), ("b", tmp_path / "saved"))
    ]
    assert made[0]["data"] == made[1]["data"]
    assert "origin" not in made[0]
    assert made[1]["origin"]["digest"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(made[1])


def test_of_several_processes_one_shows(
    tiny_llama: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    shown = {}
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        told = say(capsys, "train", tiny_llama, rows, "--dry-run", 1)
        assert told.status == 0
        shown[rank] = told.out
    assert "what is learnt" in shown["0"]
    assert shown["1"] == ""


def test_it_takes_the_options_of_train(
    tiny_llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_llama, rows, tmp_path / "a", method="prompt", steps=1)
    context = ["--max-length", 64]
    others = ["--require", "forgetting<1", "--general", "rows", "--tensorboard", "curves", *context]
    plain = say(capsys, "train", tiny_llama, rows, "--dry-run", 1, *context)
    assert (plain.status, say(capsys, "train", tiny_llama, rows, "--dry-run", 1, *others).out) == (0, plain.out)
    assert say(capsys, "train", tiny_llama, rows, "--dry-run", 1, "--from", tmp_path / "a", *context).status == 0
    refused = say(capsys, "train", tiny_llama, rows, "--dry-run", 1, "--from", tmp_path / "a", "--method", "lora")
    assert (refused.status, "HK-OPTIONS" in refused.err) == (2, True)
