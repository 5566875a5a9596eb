"""train: from base and rows to a complete adapter folder; foreseeable refusals come before the first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from variants import names, refused, rows_file, say, small_disk, tree

from hubkit.artifact.folder import open_adapter
from hubkit.errors import HubkitError
from hubkit.training.events import Saved, Stepped
from hubkit.verbs.pack import pack
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return rows_file(tmp_path / "rows.jsonl")


def quick(base: Path, rows: Path, out: Path, **options: Any) -> Any:
    return train(str(base), rows, out, **{"steps": 4, "learning_rate": 0.01, "config": {"rank": 2}, **options})


def test_a_complete_adapter(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    done = quick(tiny_llama, rows, tmp_path / "chat", validation=0.2, license="mit")
    opened = open_adapter(tmp_path / "chat")
    manifest = opened.manifest
    assert (manifest.digest, manifest.name, manifest.license) == (done.digest, "chat", "mit")
    assert (manifest.method, manifest.config["rank"]) == ("lora", 2)
    assert names(tmp_path / "chat") == {
        "hubkit.json",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tensors.json",
        "metrics.json",
    }
    metrics = json.loads((tmp_path / "chat" / "metrics.json").read_text())
    assert manifest.training is not None
    assert metrics == manifest.training["metrics"]
    assert metrics["validation_loss"] < metrics["untrained_loss"]
    assert verify(str(tmp_path / "chat"), base=str(tiny_llama)).overrides == ()
    assert not (tmp_path / "chat.run" / "checkpoint.safetensors").exists()


def test_the_same_seed_gives_the_same_bytes(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    config = {"rank": 2, "dropout": 0.2}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        quick(tiny_llama, rows, tmp_path / name / "chat", seed=seed, validation=0.2, config=config)
    assert tree(tmp_path / "a" / "chat") == tree(tmp_path / "b" / "chat")
    a, c = (tree(tmp_path / name / "chat")["adapter_model.safetensors"] for name in "ac")
    assert a != c


class Stop(Exception):
    """Ends a run between two steps, as a kill would."""


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_stopped_and_resumed(stop: int, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    options = {"steps": 6, "save_every": 2, "validation": 0.2, "eval_every": 3, "config": {"rank": 2, "dropout": 0.1}}
    quick(tiny_llama, rows, tmp_path / "whole" / "chat", **options)
    seen: list[int] = []

    def report(event: object) -> None:
        if isinstance(event, Stepped):
            seen.append(event.step)
            if event.step == stop:
                raise Stop

    out = tmp_path / "stopped" / "chat"
    with pytest.raises(Stop):
        quick(tiny_llama, rows, out, report=report, **options)
    assert not out.exists()
    if stop > 1:
        assert "--resume" in refused("HK-EXISTS", quick, tiny_llama, rows, out, **options).fix
        error = refused("HK-RESUME", quick, tiny_llama, rows, out, resume=True, **{**options, "seed": 9})
        assert any(line.startswith("seed") for line in error.have)
    seen.clear()
    stop = 0
    quick(tiny_llama, rows, out, resume=True, report=report, **options)
    assert tree(out) == tree(tmp_path / "whole" / "chat")
    assert len(seen) < 6 or not (tmp_path / "stopped" / "chat.run").exists() or seen[0] == 1


def test_nothing_is_left_to_resume(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    """A finished adapter is not trained again, and not replaced, by asking to resume it."""
    quick(tiny_llama, rows, tmp_path / "chat")
    before = tree(tmp_path)
    assert (
        "nothing to resume"
        in refused("HK-EXISTS", quick, tiny_llama, rows, tmp_path / "chat", resume=True, seed=5).what
    )
    assert "--replace" in refused("HK-EXISTS", quick, tiny_llama, rows, tmp_path / "chat").fix
    assert tree(tmp_path) == before
    quick(tiny_llama, rows, tmp_path / "new", resume=True)
    assert open_adapter(tmp_path / "new").manifest.name == "new"


def test_killed_after_the_last_byte_and_resumed(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    """The adapter is there and so is its checkpoint: the same bytes again, without a step."""
    kept = tmp_path / "kept"

    def keep(event: object) -> None:
        if isinstance(event, Saved):
            shutil.copytree(tmp_path / "chat.run", kept, dirs_exist_ok=True)

    quick(tiny_llama, rows, tmp_path / "chat", report=keep)
    before = tree(tmp_path / "chat")
    shutil.rmtree(tmp_path / "chat.run")
    kept.rename(tmp_path / "chat.run")
    steps: list[object] = []
    quick(tiny_llama, rows, tmp_path / "chat", resume=True, report=steps.append)
    assert tree(tmp_path / "chat") == before
    assert not [event for event in steps if isinstance(event, Stepped)]


def test_replacing_keeps_hand_written_words(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    quick(tiny_llama, rows, tmp_path / "chat")
    card = tmp_path / "chat" / "README.md"
    card.write_bytes(card.read_bytes() + b"\nGr\xfcn, by hand.\n")  # not even UTF-8
    quick(tiny_llama, rows, tmp_path / "chat", replace=True, seed=3)
    assert "by hand." in card.read_text()
    training = pack(tmp_path / "chat").manifest.training
    assert training is not None
    assert training["options"]["seed"] == 3


def test_an_empty_folder_is_free(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    quick(tiny_llama, rows, tmp_path / "chat")
    assert open_adapter(tmp_path / "chat")


def trap(event: object) -> None:
    raise AssertionError("training has begun")


def test_what_can_be_foreseen_is_refused_before_training(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years")
    damaged = tmp_path / "damaged"
    quick(tiny_llama, rows, damaged)
    shutil.rmtree(tmp_path / "damaged.run")
    (damaged / "README.md").write_text("<!-- hubkit:begin -->\n")
    before = tree(tmp_path)
    refused("HK-EXISTS", quick, tiny_llama, rows, work, report=trap)
    refused("HK-EXISTS", quick, tiny_llama, rows, work, report=trap, replace=True)
    refused("HK-EXISTS", quick, tiny_llama, rows, rows, report=trap)
    refused("HK-CARD", quick, tiny_llama, rows, damaged, report=trap, replace=True)
    refused("HK-NAME", quick, tiny_llama, rows, tmp_path / "a b", report=trap)
    refused("HK-NAME", quick, tiny_llama, rows, tmp_path / "x", report=trap, name="../x")
    refused("HK-SECRET", quick, tiny_llama, rows, tmp_path / "x", report=trap, license="hf_" + "A1" * 17)
    assert tree(tmp_path) == before


def bases_that_are_none(base: Path, tmp_path: Path) -> dict[str, tuple[object, int, str]]:
    """Name -> what is given as the base, exit status, code."""
    made = {name: tmp_path / name for name in ("hollow", "cut", "pickled", "text", "token", "shape", "strange", "list")}
    for path in made.values():
        shutil.copytree(base, path)
    weights = (base / "model.safetensors").read_bytes()
    (made["hollow"] / "model.safetensors").unlink()
    (made["cut"] / "model.safetensors").write_bytes(weights[:-1])
    (made["pickled"] / "model.safetensors").rename(made["pickled"] / "pytorch_model.bin")
    (made["text"] / "config.json").write_text("{")
    (made["token"] / "tokenizer.json").write_text('{"model": 5}')
    config = json.loads((base / "config.json").read_text())
    (made["shape"] / "config.json").write_text(json.dumps({**config, "hidden_size": 24}))
    (made["strange"] / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows"}))
    (made["list"] / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "many"}))
    return {
        "missing": (tmp_path / "nope", 1, "HK-BASE-MISSING"),
        "not a reference": ("nope", 2, "HK-REFERENCE"),
        "no weights": (made["hollow"], 1, "HK-BASE-FILES"),
        "cut weights": (made["cut"], 1, "HK-SAFETENSORS"),
        "pickled weights": (made["pickled"], 1, "HK-PICKLE"),
        "config no JSON": (made["text"], 1, "HK-JSON"),
        "tokenizer of nothing": (made["token"], 1, "HK-TOKENIZER"),
        "config of another shape": (made["shape"], 1, "HK-BASE-INCOMPLETE"),
        "unknown architecture": (made["strange"], 1, "HK-BASE-LOAD"),
        "config of other types": (made["list"], 1, "HK-TOKENIZER-LOAD or HK-BASE-LOAD"),  # transformers 5 or 4.57
    }


def test_a_missing_or_unreadable_base(
    tiny_llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = bases_that_are_none(tiny_llama, tmp_path)
    before = tree(tmp_path)
    for case, (base, status, code) in cases.items():
        said = say(capsys, "train", base, rows, "-o", tmp_path / "x", "--steps", 1)
        assert said.refusal(status) in code.split(" or "), (case, said.err)
    assert tree(tmp_path) == before


DATA: dict[str, tuple[str, str, tuple[object, ...], str]] = {
    "no such column": ("r.jsonl", '{"a": "x", "b": "y"}', ("--text", "nope"), "HK-COLUMNS"),
    "no usual column": ("r.jsonl", '{"a": "x", "b": "y"}', (), "HK-COLUMNS"),
    "a column in some rows": ("r.jsonl", '{"text": "x"}\n{"txt": "y"}', (), "HK-COLUMNS"),
    "prompt without completion": ("r.jsonl", '{"a": "x"}', ("--prompt", "a"), "HK-COLUMNS"),
    "no rows": ("r.jsonl", "\n\n", (), "HK-NO-ROWS"),
    "no JSON": ("r.jsonl", '{"text": "x"}\n{"text":', (), "HK-DATA"),
    "half of a character": ("r.jsonl", '{"text": "cut \\ud83d"}', (), "HK-DATA"),
    "no objects": ("r.jsonl", '["x"]', (), "HK-DATA"),
    "no text": ("r.jsonl", '{"text": 5}', (), "HK-DATA"),
    "unknown suffix": ("r.xlsx", "PK", (), "HK-DATA"),
    "ragged CSV": ("r.csv", "text\nx,y\n", (), "HK-DATA"),
    "a long row": ("r.jsonl", json.dumps({"text": "word " * 400}), (), "HK-ROW-TOO-LONG"),
    "nothing to learn": ("r.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', (), "HK-NO-TARGETS"),
    "no messages": ("r.jsonl", '{"messages": "hello"}', (), "HK-DATA"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_rows(case: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, text, more, code = DATA[case]
    (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    said = say(capsys, "train", tiny_llama, tmp_path / name, "-o", tmp_path / "x", "--steps", 1, *more)
    assert said.refusal() == code, said.err
    assert name in said.err or "where: flags" in said.err
    assert tree(tmp_path) == before


def test_rows_that_are_not_utf8(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}')
    said = say(capsys, "train", tiny_llama, tmp_path / "r.jsonl", "-o", tmp_path / "x")
    assert said.refusal() == "HK-DATA"
    assert "r.jsonl:2" in said.err


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        (("--set", "targets=q_proj,nope"), 1, "HK-TARGET"),
        (("--set", "targets=nope"), 1, "HK-TARGET"),
        (("--set", "targets=.*nothing.*"), 1, "HK-TARGET"),
        (("--set", "targets=(("), 1, "HK-TARGET"),
        (("--set", "rnk=4"), 1, "HK-CONFIG"),
        (("--set", "rank=many"), 1, "HK-CONFIG"),
        (("--set", "rank=0"), 1, "HK-CONFIG"),
        (("--set", "rank"), 2, "HK-CONFIG"),
        (("--set", "rank=4000000000000"), 1, "HK-MEMORY"),
        (("--set", "rank_pattern=q_proj=two"), 1, "HK-CONFIG"),
        (("--set", "rank_pattern=(a+)+b=2"), 1, "HK-PATTERN"),
        (("--method", "loar"), 1, "HK-METHOD-UNKNOWN"),
        (("--steps", 0), 2, "HK-OPTIONS"),
        (("--steps", 3, "--epochs", 2), 2, "HK-OPTIONS"),
        (("--lr", -1), 2, "HK-OPTIONS"),
        (("--patience", 2), 2, "HK-OPTIONS"),
        (("--max-length", 9999), 2, "HK-OPTIONS"),
        (("--steps", "many"), 2, "HK-USAGE"),
        (("--shiny",), 2, "HK-USAGE"),
    ],
)
def test_bad_options(
    more: tuple[object, ...],
    status: int,
    code: str,
    tiny_llama: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tree(tmp_path)
    said = say(capsys, "train", tiny_llama, rows, "-o", tmp_path / "x", *more)
    assert said.refusal(status) == code, said.err
    assert tree(tmp_path) == before


def test_an_unknown_option_of_the_function(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    error = refused("HK-OPTIONS", quick, tiny_llama, rows, tmp_path / "x", learning_rte=1)
    assert (error.status, error.fix) == (2, "near: learning_rate")


def test_a_full_disk(tiny_llama: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a checkpoint, in the adapter: no adapter, no half of a checkpoint; resumed, all is well."""
    options = {"steps": 6, "save_every": 2}
    quick(tiny_llama, rows, tmp_path / "whole" / "chat", **options)
    out, run = tmp_path / "full" / "chat", tmp_path / "full" / "chat.run"
    largest = max(len(data) for data in tree(tmp_path / "whole").values())
    for size in (0, 400, 5000, largest - 1000):
        with small_disk(size):
            refused("HK-DISK", quick, tiny_llama, rows, out, resume=True, **options)
        assert not out.exists()
        assert names(run) <= {"metrics.jsonl", "checkpoint.safetensors", "metrics.json", "loss.svg"}
    with small_disk(400):
        line = ("--steps", 6, "--save-every", 2, "--set", "rank=2", "--lr", 0.01, "--resume")
        said = say(capsys, "train", tiny_llama, rows, "-o", out, *line)
        assert "error[HK-DISK]" in said.err
        assert said.status == 1
    quick(tiny_llama, rows, out, resume=True, **options)
    assert tree(out) == tree(tmp_path / "whole" / "chat")


def test_a_run_that_breaks_down(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(HubkitError) as refusal:
        quick(broken, rows, tmp_path / "x")
    assert refusal.value.code == "HK-NAN"
    assert not (tmp_path / "x").exists()
