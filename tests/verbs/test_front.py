"""Virtual tokens take room of the base's context: `train` and `generate` count them before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from making import make_adapter
from variants import refused, rows_file, say

from hubkit.training.events import Stepped
from hubkit.verbs.generate import generate
from hubkit.verbs.train import train

CONTEXT, N = 256, 200
"""Of the tiny bases, and what is left of it: 56 tokens."""


@pytest.fixture(params=["prefix", "prompt"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def trap(event: object) -> None:
    raise AssertionError("training has begun")


def test_rows_that_leave_no_room_are_refused_or_cut(
    method: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "' + "a z " * 30 + '"}\n' + '{"text": "short"}\n')
    how: dict[str, Any] = {"method": method, "config": {"num_virtual_tokens": N}, "steps": 2}
    for _ in range(2):
        error = refused("HK-ROW-TOO-LONG", train, str(base), data, tmp_path / "no", report=trap, **how)
        assert f"{CONTEXT - N} tokens beside {N} virtual ones" in str(error.want)
    long = refused("HK-OPTIONS", train, str(base), data, tmp_path / "no", report=trap, max_length=57, **how)
    assert f"at most {CONTEXT - N} beside {N} virtual tokens" in str(long.want)
    assert not list(tmp_path.glob("no*"))
    steps: list[object] = []
    train(str(base), data, tmp_path / "yes", report=steps.append, truncate=True, **how)
    assert sum(isinstance(step, Stepped) for step in steps) == 2
    train(str(base), data, tmp_path / "plain", config={"rank": 1}, steps=1)  # no virtual tokens: the row fits
    room = CONTEXT - N - 20
    said = say(capsys, "generate", "x", "--raw", "-b", base, "-a", tmp_path / "yes", "--max-new-tokens", 56)
    assert said.refusal() == "HK-ROW-TOO-LONG"
    assert f"{N} virtual + 1 of the prompt + 56 new" in said.err
    assert generate("x", base=str(base), terms=str(tmp_path / "yes"), raw=True, max_new_tokens=room).tokens <= room
    assert generate("x", base=str(base), raw=True, max_new_tokens=56).tokens <= 56
    both = f"{tmp_path / 'yes'} + {make_adapter(tmp_path / 'lora', base)}"
    refused("HK-ROW-TOO-LONG", generate, "x", base=str(base), terms=both, raw=True, max_new_tokens=56)


def test_a_front_longer_than_the_context(
    method: str, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows_file(tmp_path / "rows.jsonl")
    for count in (CONTEXT, CONTEXT + 1, 10**9):
        options = ("--method", method, "--set", f"num_virtual_tokens={count}", "-o", tmp_path / "no")
        said = say(capsys, "train", tiny_gpt2, data, *options)
        assert said.refusal() == "HK-CONFIG"
        assert f"1 to {CONTEXT - 1}" in said.err
    assert not list(tmp_path.glob("no*"))
