"""Wall time of ``hubkit --help`` over that of ``hf --help``: interleaved rounds, median of per-round ratios."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROUNDS = 9
TARGET = 0.2


def seconds(command: str) -> float:
    start = time.perf_counter()
    subprocess.run([str(Path(sys.executable).parent / command), "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


@pytest.mark.slow
def test_help_beside_hf() -> None:
    for command in ("hubkit", "hf"):
        seconds(command)
    rounds = [(seconds("hubkit"), seconds("hf")) for _ in range(ROUNDS)]
    ratio = statistics.median(ours / peer for ours, peer in rounds)
    ours, peer = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"\nhubkit --help {ours:.3f} s, hf --help {peer:.3f} s, ratio {ratio:.2f} (wanted: at most {TARGET})")
