"""The examples work: rows are what they say, and the quickstart goes through, with a few steps of training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / "data" / name).read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("task", "train", "heldout"), [("e2e", 360, 32), ("gsm8k", 120, 30)])
def test_rows_are_complete_and_held_out_ones_are_unseen(task: str, train: int, heldout: int) -> None:
    seen, unseen = rows(f"{task}_train.jsonl"), rows(f"{task}_heldout.jsonl")
    assert (len(seen), len(unseen)) == (train, heldout)
    assert all(set(row) == {"prompt", "completion"} and all(row.values()) for row in seen + unseen)
    assert not {row["prompt"] for row in seen} & {row["prompt"] for row in unseen}


@pytest.mark.slow
@pytest.mark.model
def test_the_quickstart_goes_through(smol: Path, tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "STEPS": "2",
        "WORK": str(tmp_path / "w"),
    }
    done = subprocess.run(
        [EXAMPLES / "quickstart" / "run"], env=environment, capture_output=True, text=True, check=False, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pushed ana/restaurant 1.0.0" in done.stdout
    assert re.search(r"^ok +base +", done.stdout, re.MULTILINE)
    losses = dict(re.findall(r"^  (base|adapted|merged) +(\d\.\d{4})$", done.stdout, re.MULTILINE))
    assert list(losses) == ["base", "adapted", "merged"]
    assert float(losses["adapted"]) < float(losses["base"])
    assert float(losses["merged"]) == pytest.approx(float(losses["adapted"]), abs=0.02)  # both round to bf16, elsewhere
