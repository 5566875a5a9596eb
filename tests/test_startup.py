"""Asking for help or for the list of methods is immediate: neither imports what only real work needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hubkit.cli.table import COMMANDS

WORK_ONLY = ("torch", "huggingface_hub", "jsonschema", "numpy", "rich", "transformers", "safetensors", "starlette")
OF_THE_GROUP = ("boundary", "group", "output", "table")

PROBE = """
import sys
from hubkit.cli import run
status = run(sys.argv[1:])
print("LOADED", *sorted({name.split(".")[0] for name in sys.modules}))
sys.exit(status)
"""


LINES = ["", "--help", "--version", "methods", "methods --json", *(f"{name} --help" for name in COMMANDS)]


@pytest.mark.parametrize("arguments", [line.split() for line in LINES], ids=" ".join)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rsplit("LOADED", 1)[1].split())
    assert sorted(loaded & set(WORK_ONLY)) == []


def test_help_imports_no_command() -> None:
    probe = "import sys; from hubkit.cli import run; run(['--help']); print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.rsplit("LOADED", 1)[1].split() if name.split(".")[0] == "hubkit"}
    assert loaded == {
        "hubkit",
        "hubkit.errors",
        "hubkit.cli",
        *(f"hubkit.cli.{m}" for m in ("boundary", "group", "output", "table")),
    }


def test_import_hubkit_costs_nothing() -> None:
    probe = "import sys; before = set(sys.modules); import hubkit; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    foreign = {name for name in done.stdout.split() if name.split(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"hubkit"}
