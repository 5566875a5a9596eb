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
from projects import publish_base, put, ship

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
    assert say("list")[1].splitlines()[0].split() == ["REFERENCE", "KIND", "SIZE", "PULLED", "KNOWN", "AS"]
    row = say("list")[1].splitlines()[1]
    assert re.match(r"ana/chat@[0-9a-f]{12}  adapter  [\d.]+ kB  \d{4}-\d\d-\d\d  ", row), row
    assert len(row) < 100
    assert say("list", "--remote")[1] == "REPOSITORY  VERSIONS\nana/chat    v0.1.0\n"
    assert json.loads(say("list", "--json")[1])[0]["kind"] == "adapter"
    text = say("inspect", "ana/chat")[1]
    assert text.startswith("chat 0.1.0  (ana/chat@")
    assert re.search(r"^rank +2$", text, re.MULTILINE)
    assert json.loads(say("inspect", adapter, "--json")[1])["manifest"]["schema"] == "hubkit/manifest/1"


def test_the_store_is_looked_after(say: Any, adapter: Path, registry: str) -> None:
    assert say("cache", "list")[1] == "the store is empty\n"
    say("push", adapter, "ana/chat")
    say("pull", "ana/chat")
    lines = say("cache", "list")[1].splitlines()
    assert lines[0].split() == ["REFERENCE", "KIND", "SIZE", "PULLED", "USED", "NEEDED", "BY"]
    assert re.match(r"ana/chat@[0-9a-f]{12}  adapter  [\d.]+ kB  \d{4}-\d\d-\d\d  \d{4}-\d\d-\d\d$", lines[1])
    assert say("cache", "prune")[1] == "0 artifacts removed, 0 B free\n"
    status, out, _ = say("cache", "prune", "--older-than", "0d", "--dry-run")
    assert status == 0
    assert re.search(r"^  - ana/chat@\w{12}  adapter .*\n1 artifact would be removed, [\d.]+ kB would be free$", out)
    assert say("cache", "verify")[0] == 0
    assert json.loads(say("cache", "remove", "ana/chat", "--json")[1])["removed"][0]["kind"] == "adapter"
    assert say("cache", "remove", "ana/chat")[0] == 1
    assert say("cache", "prune", "--force")[0] == 2


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


def test_a_project_from_add_to_bundle(say: Any, tmp_path: Path, registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """add → lock → sync → outdated → upgrade one → diff → bundle → remove, as typed."""
    publish_base()
    ship("lora", "ana/chat", tmp_path / "chat", version="1.0.0")
    put("dora", tmp_path / "project" / "sql")
    monkeypatch.chdir(tmp_path / "project")
    status, out, _ = say("add", "ana/chat@^1", "--base", "ana/base")
    assert status == 0
    assert out.startswith("added chat = ana/chat@^1 to hubkit.toml, which was made\nhubkit.lock  changed: base, chat\n")
    assert say("add", "./sql", "--weight", "-0.5")[1].startswith("added sql = ./sql to hubkit.toml\n")
    status, out, _ = say("sync")
    assert status == 0
    assert re.search(r"^hubkit.lock  synced, \S+ \S+ fetched$", out, re.MULTILINE)
    assert "hubkit.lock  synced, nothing to fetch\n" in say("sync", "--frozen", "--offline")[1]
    ship("lora", "ana/chat", tmp_path / "chat", version="1.1.0")
    ship("lora", "ana/chat", tmp_path / "chat", version="2.0.0")
    lines = say("outdated")[1].splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["base", lines[1].split()[1]],
        ["chat", "1.0.0"],
        ["sql", "1.2.3"],
    ]
    assert re.search(r"^chat +1\.0\.0 \(\w{12}\)  1\.1\.0 \(\w{12}\)  2\.0\.0 \(\w{12}\)  behind", lines[2])
    assert lines[4] == "next: hubkit lock --upgrade chat"
    shutil.copy("hubkit.lock", "old.lock")
    moved = r"chat  1\.0\.0 \(\w{12}\) -> 1\.1\.0 \(\w{12}\)\n"
    assert re.fullmatch(moved, say("lock", "--upgrade", "chat", "--diff")[1])
    assert say("lock", "--diff")[1] == "no difference\n"
    assert re.search(moved, say("lock", "--upgrade", "chat,base", "--upgrade", "sql")[1])
    assert re.fullmatch(moved, say("lock", "--diff", "old.lock")[1])
    assert say("lock", "--upgrade")[1].startswith("hubkit.lock  up to date\n")
    assert say("lock", "--upgrade", "cht")[0] == 2
    status, out, _ = say("bundle", "-o", "all.tar", "--base", "--json")
    assert (status, len(json.loads(out)["artifacts"])) == (0, 3)
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "other"))
    status, out, _ = say("sync", "new", "--from", "all.tar", "--offline", "--json")
    assert (status, {one["place"] for one in json.loads(out)["entries"]}) == (0, {"store"})
    assert say("remove", "sql")[1].startswith("removed sql from hubkit.toml\nhubkit.lock  changed: sql\n")
    assert [one["state"] for one in json.loads(say("outdated", "--json")[1])] == ["current", "newer"]
    assert say("sync", "--locked", "--frozen")[0] == 2


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
    (tmp_path / "registry").mkdir()
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


def test_config_shows_sets_and_unsets(say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_CONFIG", str(tmp_path / "config.toml"))
    assert re.search(r"^registry +hf +default$", say("config")[1], re.MULTILINE)
    status, out, _ = say("config", "set", "namespaces.labs", "hf")
    assert (status, bool(re.search(r"^namespaces\.labs +hf +file$", out, re.MULTILINE))) == (0, True)
    assert {"name": "namespaces.labs", "value": "hf", "source": "file"} in json.loads(say("config", "--json")[1])
    assert say("config", "unset", "namespaces.labs")[0] == 0
    assert say("config", "unset")[0] == 2
    assert say("config", "set", "namespace.labs", "hf")[0] == 2


def test_tag_and_yank(say: Any, adapter: Path, registry: str) -> None:
    say("push", adapter, "ana/chat")
    assert re.fullmatch(r"already  ana/chat@v0\.1\.0\ncommit  [0-9a-f]{40}\n", say("tag", "ana/chat", "0.1.0")[1])
    status, out, err = say("yank", "ana/chat@0.1.0", "--reason", "wrong rows")
    assert (status, err) == (0, "")
    assert out.startswith("ana/chat@0.1.0 is yanked: wrong rows\ncommit  ")
    assert say("pull", "ana/chat@^0.1")[0] == 1
    status, out, err = say("pull", "ana/chat@0.1.0", "--json")
    assert (status, json.loads(out)["revision"]) == (0, "v0.1.0")
    assert [line for line in err.splitlines() if "yanked" in line] == ["note: ana/chat@v0.1.0 was yanked: wrong rows"]
    assert say("yank", "ana/chat@0.1.0", "--undo")[1].startswith("ana/chat@0.1.0 is no longer yanked\ncommit  ")
    assert json.loads(say("yank", "ana/chat@0.1.0", "--undo", "--json")[1])["commit"] is None


def test_copy_says_what_it_did(say: Any, adapter: Path, registry: str, tmp_path: Path) -> None:
    say("push", adapter, "ana/chat")
    status, out, _ = say("copy", "ana/chat", tmp_path / "other", "--all-versions")
    assert status == 0
    assert out.startswith(
        f"copied  file://{registry}/ana/chat to ana/chat on a new repository on file://{tmp_path}/other"
    )
    assert re.search(r"^0\.1\.0 +\w{12} +\w{12} +\d+ files$", out, re.MULTILINE)
    again = json.loads(say("copy", "ana/chat", tmp_path / "other", "--json")[1])
    assert [one["present"] for one in again["versions"]] == [True]
    assert say("pull", "ana/chat@0.1.0", "--registry", tmp_path / "other", "--allow-moved")[0] == 0


def test_login_at_a_directory(say: Any, registry: str) -> None:
    status, out, _ = say("login")
    assert (status, out.splitlines()[0].split()[:2]) == (0, ["registry", f"file://{registry}"])
