"""Killed at any moment, a verb leaves the old state or the new one; a training goes on to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from variants import rows_file

TESTS = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "merge"])
def test_killed_at_random_moments(verb: str, adapter: Path, tiny_llama: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    line: list[str | Path] = [
        sys.executable,
        TESTS / "verbs" / "killing.py",
        verb,
        tiny_llama,
        rows_file(tmp_path / "rows.jsonl"),
        adapter,
    ]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([*line, work, "5"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    kills, word = done.stdout.split()
    assert word == "same"
    assert int(kills) >= 5, "kills that hit the work"
