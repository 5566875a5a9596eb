"""completion: what a real bash offers behind the cursor, from the store and the tables, and never an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from projects import ship

from hubkit.cli import run
from hubkit.cli.table import COMMANDS
from hubkit.engines import ENGINES
from hubkit.verbs.pull import pull

HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "jsonschema", "safetensors")
ASK = """
source <("$1" completion bash)
COMP_LINE=$2 COMP_POINT=${#2} COMP_WORDBREAKS=$' \\t\\n"\\'><=;|&(:@'
_hubkit_completion "$1"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def offered(tmp_path: Path, registry: str) -> Any:
    """What bash puts in place of the last piece of a line; the home is that of `registry`."""
    program = tmp_path / "hubkit"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m hubkit "$@"\n')
    program.chmod(0o755)

    def ask(line: str) -> list[str]:
        command = ["bash", "--norc", "-c", ASK, "bash", str(program), line]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stderr == ""
        return sorted(done.stdout.split("\n")[:-1])

    return ask


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_what_bash_offers(offered: Any, tmp_path: Path) -> None:
    ship("lora", "ana/chat", tmp_path / "chat", version="1.0.0")
    ship("lora", "ana/chat", tmp_path / "chat", version="1.1.0")
    for revision in ("1.0.0", "main"):
        pull(f"ana/chat@{revision}")
    assert offered("hubkit pu") == ["pull", "push"]
    assert offered("hubkit pull ana/c") == ["ana/chat"]
    assert offered("hubkit pull ana/chat@v") == ["v1.0.0"]  # bash replaces what is behind the @ alone
    assert "main" in offered("hubkit verify ana/chat@")
    assert offered("hubkit deploy out --engine ") == sorted(ENGINES)
    assert offered("hubkit export ana/chat --to=p") == ["peft"]
    assert offered("hubkit compose cha") == [""]  # the shell's own files
    assert offered("hubkit completion z") == ["zsh"]


@pytest.mark.parametrize("line", ["hubkit nonsense ", "hubkit pull 'open", "hubkit pull --nonsense x ", ""])
def test_nothing_is_said_of_what_makes_no_sense(line: str, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("no folder")
    broken = {"HUBKIT_HOME": str(tmp_path / "home"), "HUBKIT_CONFIG": str(tmp_path / "home")}
    environment = {**os.environ, **broken, "_HUBKIT_COMPLETE": "bash_complete", "COMP_WORDS": line}
    command = [sys.executable, "-m", "hubkit"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("line", ["hubkit ", "hubkit train --method ", "hubkit pull a", "hubkit deploy --engine "])
def test_no_model_library_is_imported(line: str) -> None:
    probe = "import sys; from hubkit.cli import run; run([]); print('LOADED', *sys.modules)"
    environment = {**os.environ, "_HUBKIT_COMPLETE": "bash_complete", "COMP_WORDS": line}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.rsplit("LOADED", 1)[1].split()) & set(HEAVY) == set()
    assert done.stdout.startswith("plain\t") or line == "hubkit pull a"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_asks_hubkit(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_HUBKIT_COMPLETE" in script
    assert "2>/dev/null" in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
    assert run(["completion", "tcsh"]) == 2


def test_every_command_answers() -> None:
    """No parameter's source is broken: each word of each command is asked for once."""
    import click

    from hubkit.cli import hubkit as group
    from hubkit.cli.completing import _Answering

    answering = _Answering("hubkit", params=group.params)
    for name in COMMANDS:
        command = answering.get_command(click.Context(answering), name)
        assert command is not None
        for param in command.params:
            param.shell_complete(click.Context(command), "")
