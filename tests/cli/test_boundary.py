"""The error boundary: every way a command can end, as a process sees it: stdout, stderr and exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from variants import say

import hubkit
from hubkit.cli import group, run
from hubkit.cli import hubkit as hubkit_group
from hubkit.cli.output import emit, json_option
from hubkit.cli.table import COMMANDS
from hubkit.errors import UNDECIDED, HubkitError

HUBKIT = [sys.executable, "-m", "hubkit"]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command of our own under the name ``list`` that does what the test hands it."""

    def install(body: Any) -> None:
        @click.command("list")
        @json_option
        def command() -> None:
            body()

        monkeypatch.setattr(group.LazyGroup, "get_command", lambda self, ctx, name: command)

    return install


def raising(error: BaseException) -> Any:
    def body() -> None:
        raise error

    return body


def test_a_refusal_is_text_on_stderr(probe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    probe(raising(HubkitError("HK-X", "it cannot be", where="a\x1b[31m", want="1", have=["2", "3"], fix="hubkit list")))
    assert run(["list"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error[HK-X]: it cannot be\n  where: a\\x1b[31m\n  want:  1\n  have:  2\n         3\n  fix:   hubkit list\n"
    )


def test_a_refusal_is_one_document_with_json(probe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    probe(raising(HubkitError("HK-X", "it cannot be decided", status=UNDECIDED)))
    assert run(["list", "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"code": "HK-X", "what": "it cannot be decided"}}
    assert err == ""


@pytest.mark.parametrize("arguments", [["list", "--no-such"], ["--no-such"], ["lits"], ["list", "surplus"]], ids=str)
def test_wrong_usage_is_2(probe: Any, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    probe(lambda: None)
    assert run(arguments) == 2
    assert capsys.readouterr().err.startswith("error[HK-USAGE]: ")


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verfiy"]) == 2
    assert "fix:   hubkit verify" in capsys.readouterr().err


def test_a_full_disk_is_not_a_bug(probe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    probe(raising(OSError(28, "No space left on device", "/x/model.safetensors")))
    assert run(["list"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[HK-DISK]: the disk is full\n  where: /x/model.safetensors\n")


def test_a_bug_is_short_and_keeps_tokens_to_itself(
    probe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(raising(KeyError("hf_abcdefghijkl")))
    assert run(["list"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[HK-INTERNAL]: hubkit failed: KeyError: '<token>'\n")
    assert "Traceback" not in err
    monkeypatch.setenv("HUBKIT_DEBUG", "1")
    assert run(["list"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "hf_abcdefghijkl" not in err


def test_ctrl_c_is_130(probe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    probe(raising(KeyboardInterrupt()))
    assert run(["list"]) == 130
    assert run(["list", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "HK-INTERRUPTED"


def test_a_broken_socket_is_not_a_broken_stdout(probe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    probe(raising(BrokenPipeError(32, "Broken pipe")))
    assert run(["list"]) == 1
    assert "error[HK-OFFLINE]: a connection broke" in capsys.readouterr().err


def test_json_escapes_nothing_and_text_escapes_control_characters(
    probe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    probe(lambda: emit({"name": "a\x1bb"}, lambda result: f"name {result['name']}\nsecond"))
    assert run(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "a\x1bb"}
    assert run(["list"]) == 0
    assert capsys.readouterr().out == "name a\\x1bb\nsecond\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{' '.join(HUBKIT)} --help | true; exit ${{PIPESTATUS[0]}}"
    ended = {
        subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False).returncode
        for _ in range(3)
    }
    assert ended <= {0, 141}
    silent = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert silent.stderr == ""


def test_sigterm_unwinds(tmp_path: Path) -> None:
    code = f"""
import time, pathlib, hubkit.cli as cli, click
from hubkit.cli import group
@click.command("list")
def command():
    try:
        pathlib.Path({str(tmp_path / "started")!r}).touch()
        time.sleep(60)
    finally:
        pathlib.Path({str(tmp_path / "swept")!r}).touch()
group.LazyGroup.get_command = lambda self, ctx, name: command
raise SystemExit(cli.run(["list"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (tmp_path / "swept").exists()


def test_bare_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "pull" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"hubkit {hubkit.__version__}\n"


def test_completion_lists_commands() -> None:
    environment = {**os.environ, "_HUBKIT_COMPLETE": "bash_complete", "COMP_WORDS": "hubkit pu"}
    done = subprocess.run(HUBKIT, env=environment, capture_output=True, text=True, check=False)
    assert sorted(line.split("\t")[:2] for line in done.stdout.splitlines()) == [["plain", "pull"], ["plain", "push"]]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_is_what_the_command_says(name: str) -> None:
    """One line each, the same in ``hubkit --help`` and in the command's own help; a file and a verb each."""
    command = hubkit_group.get_command(click.Context(hubkit_group), name)
    assert isinstance(command, group.Command)
    assert (command.help or "").splitlines()[0] == COMMANDS[name]
    assert name in hubkit.VERBS


def test_a_number_below_zero_is_no_option(capsys: Any) -> None:
    """`--dry-run=-1`: click takes the value of an option that needs none for another option."""
    done = say(capsys, "train", "base", "rows.jsonl", "--out", "x", "--dry-run=-1")
    assert done.status == 2
    assert "-1 is no number that this takes" in done.err
    assert "--set" not in done.err
