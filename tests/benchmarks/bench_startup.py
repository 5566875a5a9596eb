"""Start-up: ``hubkit --help`` beside ``hf --help``, whole processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness import compare, report


def help_of(command: str) -> None:
    subprocess.run([str(Path(sys.executable).parent / command), "--help"], stdout=subprocess.DEVNULL, check=True)


def main() -> None:
    report("hubkit --help beside hf --help", compare(lambda: help_of("hubkit"), lambda: help_of("hf"), 9), 0.2)


if __name__ == "__main__":
    main()
