"""list: which stored adapters fit a base, and lines that a terminal holds."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from projects import BASE, GOLDEN, publish_base, put, ship

from hubkit.artifact.folder import AdapterFolder
from hubkit.documents.manifest import Manifest
from hubkit.errors import HubkitError
from hubkit.verbs.list import list as list_verb
from hubkit.verbs.mix import mix
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push


def other_base(folder: Path) -> AdapterFolder:
    """The golden adapter, as if made on a base of other weights."""
    manifest = Manifest.read(put("dora", folder))
    assert manifest.base is not None
    changed = replace(manifest, base=replace(manifest.base, weights=f"sha256:{'0' * 64}", files={}))
    (folder / "hubkit.json").write_bytes(changed.to_bytes())
    return AdapterFolder(folder, changed)


@pytest.fixture
def stored(registry: str, tmp_path: Path) -> None:
    publish_base()
    ship("lora", "ana/chat", tmp_path / "chat", version="1.0.0")
    push(other_base(tmp_path / "sql").path, "ana/sql")
    for repo in ("ana/chat", "ana/sql"):
        pull(repo)


def fits() -> dict[str, bool | None]:
    return {one.reference.rpartition("/")[2].partition("@")[0]: one.fits for one in list_verb(base=BASE)}


def test_what_fits_a_base(stored: None, tmp_path: Path) -> None:
    assert fits() == {"chat": True, "sql": False}
    pull("ana/base", base=True)
    mix("ana/chat + 0.5*ana/chat", tmp_path / "twice")
    push(tmp_path / "twice", "ana/twice")
    pull("ana/twice")
    assert fits() == {"chat": True, "sql": False, "twice": True, "base": None}
    other = tmp_path / "other"
    shutil.copytree(BASE, other)
    with (other / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x01\x02\x03\x04")
    assert {one.fits for one in list_verb(base=str(other)) if one.kind != "base"} == {False}
    assert all(one.fits is None for one in list_verb())


def test_a_base_that_cannot_be_asked_about_is_taken_from_the_store(stored: None, registry: str) -> None:
    pull("ana/base", base=True)
    (named,) = {one.fits for one in list_verb("ana/chat", base="ana/base")}
    assert named is True
    with pytest.raises(HubkitError) as refusal:
        list_verb(base=BASE, registry=registry)
    assert refusal.value.code == "HK-OPTIONS"
    assert "hubkit search --base" in refusal.value.fix


def test_lines_are_no_wider_than_the_terminal(registry: str, tmp_path: Path) -> None:
    long = f"an-organisation-of-many-words/{'a-name-as-long-as-names-are-' * 2}here"
    ship("lora", long, tmp_path / "chat", version="1.0.0")
    pull(long)
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "hubkit", "list", "--base", str(GOLDEN / "base")]
    done = subprocess.run(command, stdout=slave, env=environment, check=False)
    os.close(slave)
    lines = os.read(master, 10_000).decode().splitlines()
    os.close(master)
    assert done.returncode == 0
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines), lines
    assert "..." in lines[1]
    assert " yes " in lines[1]
