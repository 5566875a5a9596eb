"""scripts/gpu and its benchmarks: they run wherever there is a device, and say so where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bench_gpu
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_every_row_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a tiny model and the CPU: the same code as on a GPU."""
    out = tmp_path / "figures.md"
    bench_gpu.main(["--sizes", "tiny", "--device", "cpu", "--out", str(out), "--seconds", "100"])
    text = out.read_text()
    for row in (
        "NF4 encode",
        "NF4 decode",
        "tiny LoRA step",
        "tiny QLoRA step",
        "tiny LoRA step packed, 2 rows of 2 to 16",
        "tiny LoRA step 2x16, FSDP2 on one rank",
        "tiny prefill 4x64, 4 adapters",
        "tiny decode 4x1, 1 adapter",
        "tiny merge and unmerge",
    ):
        assert row in text
    assert text.rstrip().endswith("no time for: -")


def test_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    out = tmp_path / "figures.md"
    bench_gpu.main(["--sizes", "tiny", "--device", "cpu", "--out", str(out), "--seconds", "0"])
    assert "no time for: NF4 encode" in out.read_text()
    assert "tiny merging" in out.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs for minutes")
def test_without_a_gpu_the_script_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "gpu", tmp_path / "figures.md"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1
    assert "HK-DEVICE" in done.stderr
    assert list(tmp_path.iterdir()) == []
