"""advise: rules by traits, a limit that is kept, a command that runs as printed."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from variants import refused, rows_file, say

from hubkit.cli.advise import _scaled, _span
from hubkit.methods.host import host
from hubkit.training.advice.choosing import Choice, candidates, chosen, kinds, reasons, ways
from hubkit.training.advice.falling_short import changes, described
from hubkit.training.advice.timing import LEAST
from hubkit.verbs.advise import advise
from hubkit.verbs.plan import plan

LOW, PACKED = ("low-rank",), ("low-rank", "quantized-base")


def many(path: Path, count: int) -> Path:
    lines = [json.dumps({"prompt": f"the cat {n}", "completion": "sat on the mat"}) for n in range(count)]
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_the_kinds_that_ship() -> None:
    assert kinds()[LOW] == host().default()
    assert set(kinds()) == {LOW, PACKED, ("prompt",), ("whole-weights",)}


def test_few_rows_are_for_the_prompt() -> None:
    found = kinds()
    assert candidates(99, 10**6, 1, found) == [found["prompt",]]
    assert candidates(100, 10**3, 10**6, found) == [found[LOW], found[PACKED]]
    assert candidates(100, 10**6, 10**3, found) == [found["whole-weights",], found[LOW], found[PACKED]]


def test_the_first_way_that_fits_is_taken() -> None:
    def total(method: str, size: int, checkpointing: bool, shard: bool = False) -> int:
        return (10 if shard else 100 if method == "a" else 50) + size * (1 if checkpointing else 10)

    assert chosen(["a", "b"], total, 1000)[0] == Choice("a", 8, 1, False, False, 180)
    assert chosen(["a", "b"], total, 125)[0] == Choice("a", 2, 4, False, False, 120)
    assert chosen(["a", "b"], total, 109)[0] == Choice("a", 8, 1, True, False, 108)
    assert chosen(["a", "b"], total, 99)[0] == Choice("b", 4, 2, False, False, 90)
    assert chosen(["a", "b"], total, 50) == (None, Choice("b", 1, 8, True, False, 51))
    assert all(way.batch_size * way.accumulate == 8 for way in ways(["a"], total, 1000))
    assert [*ways(["a"], total, 1000)] == sorted(
        ways(["a"], total, 1000), key=lambda w: (w.checkpointing, -w.batch_size)
    )


def test_where_the_least_way_does_not_fit_the_others_are_not_counted() -> None:
    counted: list[tuple[str, int, bool]] = []

    def total(method: str, size: int, checkpointing: bool, shard: bool = False) -> int:
        counted.append((method, size, checkpointing))
        return 1000

    assert chosen(["a", "b"], total, 999)[0] is None
    assert counted == [("a", 8, False), ("a", 1, True), ("b", 8, False), ("b", 1, True)]


@pytest.mark.parametrize("rows", [10, 1000])
def test_every_line_has_a_source(rows: int) -> None:
    found = kinds()
    for method in found.values():
        for one in reasons(rows, 5000, Choice(method, 1, 8, True, True, 1), found, "24 GB"):
            assert one.advice
            assert one.why
            assert one.source.startswith("https://")


def test_the_command_runs_as_printed(tiny_llama: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data = many(tmp_path / "my rows.jsonl", 120)
    done = advise(tiny_llama, data)
    assert (done.fine_tune, done.method, done.rows) == (True, host().default(), 120)
    assert done.memory <= done.limit
    program, *words = shlex.split(done.command)
    assert program == "hubkit"
    run = say(capsys, *words, "--steps", "1")
    assert run.status == 0, run.err
    assert (tmp_path / f"my-rows-{done.method}" / "hubkit.json").is_file()


def test_few_rows_and_gpus(tiny_llama: Path, tmp_path: Path) -> None:
    done = advise(tiny_llama, rows_file(tmp_path / "rows.jsonl"), memory="24GB", gpus=2)
    assert (done.fine_tune, done.limit) == (False, 24 * 10**9)
    assert done.method == kinds()["prompt",]
    assert done.command.startswith("torchrun --nproc-per-node 2 -m hubkit train ")
    assert "--batch-size 4 --accumulate 2" in done.command
    assert "--shard" not in done.command


@pytest.mark.parametrize("processes", [2, 3, 8, 16])
def test_each_process_has_as_many_forward_passes(processes: int) -> None:
    low, prompt = kinds()[LOW], kinds()["prompt",]
    found = list(ways([low, prompt], lambda *way: 1, 1, processes))
    assert all(way.accumulate % processes == 0 for way in found)
    assert {way.shard for way in found if way.method == low} == {False, True}
    assert not any(way.shard for way in found if way.method == prompt)


def test_what_is_trained_is_whole_in_each_process(tiny_llama: Path) -> None:
    one, two = (plan(tiny_llama, gpus=gpus).methods[0].memory for gpus in (1, 2))
    assert [two[name] for name in ("parameters", "gradients", "moments")] == [
        one[name] for name in ("parameters", "gradients", "moments")
    ]
    assert two["weights"] == -(-one["weights"] // 2)


def test_for_people_and_programs(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    data = many(tmp_path / "rows.jsonl", 120)
    told = say(capsys, "advise", tiny_llama, data, "--memory", "24GB")
    assert told.status == 0
    assert told.out.splitlines()[1] == "first   fine-tune"
    assert told.out.splitlines()[-1].startswith("hubkit train ")
    assert json.loads(say(capsys, "advise", tiny_llama, data, "--memory", "24GiB", "--json").out)["limit"] == 24 << 30
    every = json.loads(say(capsys, "plan", tiny_llama, data, "--method", "all", "--json").out)
    assert len(every["methods"]) == len(host().offers())
    assert "on each of 2 processes" in say(capsys, "plan", tiny_llama, "--gpus", "2").out


@pytest.mark.parametrize("memory", ["", "much", "-1GB", "0", "24 TB"])
def test_a_memory_that_cannot_be_read(memory: str, tiny_llama: Path, tmp_path: Path) -> None:
    data = rows_file(tmp_path / "rows.jsonl")
    refused("HK-OPTIONS", lambda: advise(tiny_llama, data, memory=memory))


def test_nothing_fits(tiny_llama: Path, tmp_path: Path) -> None:
    data = many(tmp_path / "rows.jsonl", 120)
    error = refused("HK-MEMORY", lambda: advise(tiny_llama, data, memory="1KB"))
    (want,) = error.want
    assert any(name in want for name in kinds().values())
    assert "one row at a time" in want
    assert error.fix.endswith("GB of memory, or a smaller base")


def test_what_would_make_it_fit() -> None:
    """Each alone: halved rows, doubled GPUs; and memory that suffices, rounded up."""
    way = Choice("a", 1, 8, True, False, 24_100_000_000)

    def needs(way: Choice, tokens: int, processes: int) -> int:
        return 10 * tokens // processes

    assert changes(way, needs, 3000, 1000, 1, True) == [
        "rows of at most 250 tokens (hubkit train --max-length 250 --truncate)",
        "--gpus 4",
        "24.1 GB of memory",
        "a smaller base",
    ]
    assert changes(way, needs, 30, 1000, 1, True) == ["24.1 GB of memory", "a smaller base"]
    assert changes(way, needs, 3000, 1000, 8, False)[0].startswith("rows of at most 500")
    assert changes(replace(way, total=24_110_000_000), needs, 1, 40, 1, False)[0] == "24.2 GB of memory"
    assert described(way) == "a, one row at a time, activations computed again"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine is one with a GPU")
def test_time_is_of_this_machine(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    data = many(tmp_path / "rows.jsonl", 120)
    here, there = advise(tiny_llama, data), advise(tiny_llama, data, memory="24GB")
    assert here.seconds is not None
    assert 0 < here.seconds[0] < here.seconds[1]
    assert here.speed is not None
    assert here.operations == pytest.approx(here.speed * here.seconds[0] / LEAST)
    assert (there.seconds, there.speed) == (None, None)
    assert there.operations == pytest.approx(here.operations, rel=0.2)  # its attention may be another
    assert "on this machine" in say(capsys, "advise", tiny_llama, data).out
    assert "100 TFLOP/s" in say(capsys, "advise", tiny_llama, data, "--memory", "24GB").out


def test_times_are_said_in_one_unit() -> None:
    assert _span(50, 110) == "50 to 110 seconds"
    assert _span(700, 1400) == "12 to 23 minutes"
    assert _span(3000, 9000) == "0.83 to 2.5 hours"
    assert _span(0.2) == "1 seconds"
    assert [_scaled(one) for one in (2.5e8, 1.34e12, 7e16, 2e18)] == ["0.25 G", "1.34 T", "70 P", "2 E"]
