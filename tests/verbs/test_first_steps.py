"""The first steps on an empty machine: bases from the Hub and adapters in a directory, or all of it in a directory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from variants import rows_file

from hubkit.artifact.folder import open_adapter
from hubkit.verbs.add import add
from hubkit.verbs.config import config
from hubkit.verbs.copy import copy
from hubkit.verbs.pack import pack
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.sync import sync
from hubkit.verbs.train import train
from hubkit.verbs.verify import verify


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory on a machine where nothing was set or pulled."""
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HUBKIT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.delenv("HUBKIT_REGISTRY", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The Hub, as hubkit serves one: it has the base labs/tiny."""
    push(tiny_llama, "labs/tiny", registry=str(tmp_path / "hub"))
    command = [sys.executable, "-m", "hubkit", "serve", str(tmp_path / "hub"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield address
        process.terminate()


def the_tour(machine: Path) -> None:
    """Train on labs/tiny, publish, pull, prove, add to a project: what the README shows, without a flag."""
    train("labs/tiny", rows_file(machine / "rows.jsonl"), "chat", steps=1, config={"rank": 2})
    pack("chat", version="1.0.0", license="mit")
    pushed = push("chat", "ana/chat")
    assert pull("ana/chat@^1.0").commit == pushed.commit
    assert "base" in {check.name for check in verify("ana/chat@^1.0").checks}
    assert pull("ana/chat", base=True).path.is_dir()
    add("ana/chat@^1.0", base="labs/tiny")
    assert {entry.name for entry in sync(".").entries} == {"base", "chat"}


def test_bases_from_the_hub_and_adapters_in_a_directory(machine: Path, hub: str) -> None:
    config("set", "registry", "./registry")
    config("set", "namespaces.labs", "hf")
    the_tour(machine)
    assert sorted(path.name for path in (machine / "registry" / "repos").iterdir()) == ["ana"]


def test_a_directory_alone(machine: Path, tiny_llama: Path) -> None:
    config("set", "registry", "./registry")
    push(tiny_llama, "labs/tiny")
    the_tour(machine)


def test_a_base_copied_from_the_hub(machine: Path, hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config("set", "registry", "./registry")
    copy("hf://labs/tiny", "./registry")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody is there
    the_tour(machine)
    origin = open_adapter(machine / "chat").manifest.base
    assert origin is not None
    assert origin.source == "labs/tiny"
