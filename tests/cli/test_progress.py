"""Progress off a terminal: silent when quick, one line now and then, a last line only after a first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hubkit.cli import progress
from hubkit.cli.progress import ProgressBar


def test_quick_work_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("pull a/b", total=10) as work:
        work.advance(10)
    assert capsys.readouterr() == ("", "")


def test_long_work_tells(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with ProgressBar("pull a\x1b/b", total=2_000_000) as work:
        work.advance(1_000_000, "one.bin")
    assert capsys.readouterr().err == "pull a\\x1b/b: 1 MB of 2 MB (50%) one.bin\npull a\\x1b/b: 1 MB of 2 MB (50%)\n"


def test_a_terminal_gets_a_bar_and_no_markup() -> None:
    code = (
        "import sys; sys.stderr.isatty = lambda: True\n"
        "from hubkit.cli.progress import ProgressBar\n"
        "with ProgressBar('pull [red]a[/red]', total=4, unit='steps') as work:\n"
        "    work.advance(1, 'loss 2.0'); work._bar.refresh()\n"
    )
    environment = {"TERM": "xterm", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "[red]a[/red]: 1 of 4 (25%) steps loss 2.0" in done.stderr
    assert done.stdout == ""


TERMINAL = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "100"}
SLOW = """
import sys, time; sys.stderr.isatty = lambda: True
from hubkit.cli import progress
progress.QUIET_SECONDS = 0.0
with progress.ProgressBar("pull a", total=4) as work:
    time.sleep(4)
    work.advance(1)
    with progress.ProgressBar("train", total=4, unit="steps", estimate=False) as other:
        other.advance(1, "9:59 left")
        assert work._bar is None
        other._bar and other._bar.refresh()
"""


def painted(term: str) -> str:
    environment = {**TERMINAL, "TERM": term, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, env=environment, check=True)
    return done.stderr


def test_fault_24_a_terminal_is_never_silent_and_shows_one_estimate() -> None:
    out = painted("xterm")
    assert "at work" in out, "a spinner, until something counts"
    assert "train: 1 of 4 (25%) steps 9:59 left" in out
    assert "-:--:--" not in out.rpartition("train: 1 of 4")[2]


def test_fault_24_a_dumb_terminal_gets_lines() -> None:
    assert painted("dumb").startswith("pull a: 1 B of 4 B (25%)\ntrain: 1 of 4 (25%) steps 9:59 left\n")
