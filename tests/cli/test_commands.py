"""Each command as typed: one line of arguments, text for people, one JSON document for programs, the exit status."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from making import make_adapter

from hubkit.cli import run
from hubkit.documents.manifest import Manifest


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run one command line; (status, stdout, stderr)."""

    def run_line(*arguments: str | Path) -> tuple[int, str, str]:
        status = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run_line


def test_push_says_what_it_did(say: Any, adapter: Path, registry: str) -> None:
    status, out, err = say("push", adapter, "ana/chat", "--dry-run")
    assert (status, err) == (0, "")
    assert out.startswith("would push ana/chat 0.1.0 to a new repository on ")
    status, out, _ = say("push", adapter, "ana/chat", "-m", "first")
    assert status == 0
    assert out.startswith("pushed ana/chat 0.1.0 to a new repository on ")
    assert "  + adapter_model.safetensors\n" in out
    assert re.search(r"^commit  [0-9a-f]{40}$", out, re.MULTILINE)
    assert say("push", adapter, "ana/chat")[1].startswith(
        "ana/chat 0.1.0 is already published, with the same bytes\ncommit  "
    )


def test_push_in_json(say: Any, adapter: Path, registry: str) -> None:
    status, out, err = say("push", adapter, "ana/chat", "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert document["digest"] == Manifest.read(adapter).digest
    assert document["created"] is True
    (adapter / "tensors.json").write_text("{}")
    status, out, err = say("push", adapter, "ana/chat", "--json")
    assert (status, err) == (1, "")
    assert json.loads(out)["error"]["code"] == "HK-FILES"


def test_pull_list_inspect(say: Any, adapter: Path, registry: str) -> None:
    say("push", adapter, "ana/chat")
    status, out, _ = say("pull", "ana/chat@^0.1")
    path = Path(re.findall(r"^path    (.*)$", out, re.MULTILINE)[0])
    assert status == 0
    assert (path / "hubkit.json").is_file()
    assert "nothing to fetch" in say("pull", "ana/chat")[1]
    assert say("list")[1].splitlines()[0].split() == ["REFERENCE", "KIND", "SIZE", "DIGEST", "KNOWN", "AS"]
    assert say("list", "--remote")[1] == "REPOSITORY  VERSIONS\nana/chat    v0.1.0\n"
    assert json.loads(say("list", "--json")[1])[0]["kind"] == "adapter"
    text = say("inspect", "ana/chat")[1]
    assert text.startswith("chat 0.1.0  (ana/chat@")
    assert re.search(r"^rank +2$", text, re.MULTILINE)
    assert json.loads(say("inspect", adapter, "--json")[1])["manifest"]["schema"] == "hubkit/manifest/1"


def test_verify_has_three_answers(say: Any, adapter: Path, registry: str, tiny_llama: Path, tiny_gpt2: Path) -> None:
    status, out, _ = say("verify", adapter, "--base", tiny_llama)
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("ok")] == [
        ["ok", "files"],
        ["ok", "base"],
        ["ok", "tensors"],
    ]
    status, out, err = say("verify", adapter, "--base", tiny_gpt2)
    assert (status, out) == (1, "")
    assert err.startswith("error[HK-BASE-MISMATCH]: adapter 'chat' was trained on another base\n  where: ")
    assert say("verify", adapter)[0] == 3
    status, out, _ = say("verify", adapter, "--base", tiny_gpt2, "--allow-base-mismatch", "--json")
    assert status == 1  # the base is allowed to be another one; its sites still have to be there
    assert json.loads(out)["error"]["code"] == "HK-KEYS"


def test_lock_and_deploy(say: Any, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    shutil.copytree(tiny_llama, project / "model")
    make_adapter(project / "chat", tiny_llama)
    (project / "hubkit.toml").write_text('[base]\nsource = "./model"\n[adapters.chat]\nsource = "./chat"\n')
    monkeypatch.chdir(project)
    assert say("lock", "--check")[0] == 1
    assert say("lock")[1].startswith("hubkit.lock  changed: base, chat\n")
    assert say("lock")[1].startswith("hubkit.lock  up to date\n")
    assert say("lock", "--check")[0] == 0
    assert say("deploy", "out")[0] == 2
    status, out, _ = say("deploy", "out", "--engine", "merged")
    assert status == 0
    assert "run     cd out && python run.py PROMPT" in out
    assert say("deploy", "out", "--check")[0] == 0
    with (project / "out" / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    status, out, err = say("deploy", "out", "--check")
    assert (status, out) == (1, "")
    assert err.startswith("error[HK-DEPLOY-DRIFT]: the deployment is not what was deployed\n")
    assert "model/model.safetensors: sha256:" in err


def test_methods(say: Any) -> None:
    rows = json.loads(say("methods", "--json")[1])
    (default,) = [row["name"] for row in rows if row["default"]]
    described = json.loads(say("methods", default, "--json")[1])
    assert described["summary"]
    assert all(option["help"] for option in described["options"])
    assert say("methods", default)[1].startswith(f"{default}: {described['summary']}\n")
    assert say("methods", f"{default}x")[0] == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_and_stops(tmp_path: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "hubkit", "serve", str(tmp_path / "registry"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"serving {tmp_path / 'registry'} at http://127.0.0.1:")
    with urllib.request.urlopen(f"{line.split()[-1]}/api/models", timeout=10) as answer:
        assert json.load(answer) == []
    process.send_signal(stop)
    assert process.wait(20) in ((0,) if stop == signal.SIGINT else (0, 143))
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()


def test_a_foreign_name_cannot_draw_on_the_terminal(say: Any, registry: str, adapter: Path) -> None:
    from dataclasses import replace

    from hubkit.artifact.folder import write_adapter

    manifest = replace(Manifest.read(adapter), license="\x1b]0;gotcha\x07\u202emit")
    files: dict[str, bytes | Path] = {entry.path: (adapter / entry.path).read_bytes() for entry in manifest.files}
    write_adapter(adapter, manifest, files, replace=True)
    out = say("inspect", adapter)[1]
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "\\x1b]0;gotcha\\x07\\u202emit" in out
