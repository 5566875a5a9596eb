"""A keeper beside writers: what is damaged is found, whatever it is, and what is referenced is never collected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hubkit
from hubkit.registry.directory.directory import DirectoryRegistry


@pytest.fixture
def registry(tmp_path: Path) -> DirectoryRegistry:
    """Two repositories with three commits, a tag, and an object that no commit names."""
    made = DirectoryRegistry(tmp_path / "registry")
    for repo in ("ana/a", "bob/b"):
        made.create(repo)
        first = made.commit(repo, {"w.bin": repo.encode() * 100, "f.txt": b"one"}, (), message="m", parent=None)
        made.commit(repo, {"f.txt": b"two"}, (), message="m", parent=None)
        made.tag(repo, "v1.0.0", first)
    made.put("ana/a", {"waiting": b"waits for a commit"})
    return made


def test_what_is_whole(registry: DirectoryRegistry) -> None:
    found = hubkit.serve(registry.root, check=True)
    assert isinstance(found, hubkit.Checked)
    assert found.damaged == ()
    assert (found.repositories, found.commits, found.objects) == (2, 6, 7)
    assert found.size == sum(path.stat().st_size for path in registry.root.glob("repos/*/*/objects/??/*"))


def overwrite(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [overwrite, shorten, Path.unlink, replace_by_a_folder])
def test_every_file_that_is_harmed_is_named(registry: DirectoryRegistry, harm: Callable[[Path], None]) -> None:
    """Each document and object in turn, alone; the rest is read all the same."""
    folder = registry.root / "repos" / "ana" / "a"
    named = {path for path in folder.rglob("*") if path.is_file() and path.name != ".made"}
    waiting = next(path for path in named if path.read_bytes() == b"waits for a commit")
    assert len(named) == 2 + 3 + 3 + 4
    for path in sorted(named):
        kept, mode, times = path.read_bytes(), path.stat().st_mode, path.stat()
        harm(path)
        damaged = registry.check().damaged
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(kept)
        path.chmod(mode)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        if path == waiting and harm is Path.unlink:
            assert damaged == (), "it was collected"
            continue
        if path.name == "repo.json" and harm is overwrite:
            continue  # one bit in a name of a key or in a blank may mean nothing
        assert damaged, path
        assert all(line.startswith("ana/a: ") for line in damaged)
        assert any(path.name in line for line in damaged), (path, damaged)
    assert registry.check().damaged == ()


def test_refs_that_lead_nowhere(registry: DirectoryRegistry) -> None:
    path = registry.root / "repos" / "bob" / "b" / "refs.json"
    refs = json.loads(path.read_text())
    refs["tags"]["v9"] = "0" * 40
    path.write_text(json.dumps(refs))
    (line,) = registry.check().damaged
    assert "'v9'" in line


def test_the_command_says_so(registry: DirectoryRegistry) -> None:
    command = [sys.executable, "-m", "hubkit", "serve", str(registry.root), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2 repositories, 6 commits, 7 objects (1.03 kB) read again, nothing damaged\n"
    path = next(registry.root.glob("repos/ana/a/objects/??/*"))
    overwrite(path)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = json.loads(done.stdout)["damaged"]
    assert path.name in line


WRITER = """
import json, random, sys
from pathlib import Path
from hubkit.errors import HubkitError
from hubkit.registry.directory.directory import DirectoryRegistry
registry, name, count = DirectoryRegistry(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
chance, refused = random.Random(name), 0
for number in range(count):
    # contents come back, so that what is about to be collected is offered again
    files = {f"{name}-{n}": b"%d" % chance.randrange(20) * 200 for n in range(3)}
    while True:
        try:
            commit = registry.commit("org/shared", files, (), message=f"{name} {number}", parent=None)
            break
        except HubkitError as error:
            if error.code != "HK-FILES":
                raise
            refused += 1
    print(json.dumps({"commit": commit, "files": {path: data.decode() for path, data in files.items()}}), flush=True)
print(json.dumps({"refused": refused}), flush=True)
"""
KEEPER = """
import sys, time
from pathlib import Path
from hubkit.registry.directory.directory import DirectoryRegistry
registry, removed = DirectoryRegistry(Path(sys.argv[1])), 0
while not Path(sys.argv[3]).exists():
    removed += registry.collect(older=float(sys.argv[2])).objects
    damaged = registry.check().damaged
    assert damaged == (), damaged
    time.sleep(0.01)
print(removed)
"""


@pytest.mark.parametrize(("older", "count"), [(0.0, 25), (5.0, 25), pytest.param(0.0, 400, marks=pytest.mark.slow)])
def test_nothing_is_lost_beside_writers(tmp_path: Path, older: float, count: int) -> None:
    """Collecting at every moment, without any grace even: what was acknowledged is there, and is what was sent."""
    root, done = tmp_path / "registry", tmp_path / "done"
    registry = DirectoryRegistry(root)
    registry.create("org/shared")
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(root), str(older), str(done)], stdout=subprocess.PIPE)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(root), name, str(count)], stdout=subprocess.PIPE, text=True)
        for name in ("a", "b", "c")
    ]
    rows = [json.loads(line) for one in writers for line in one.communicate(timeout=600)[0].splitlines()]
    done.touch()
    assert [one.returncode for one in writers] == [0, 0, 0]
    assert keeper.communicate(timeout=60)[0]
    assert keeper.returncode == 0
    commits = [row for row in rows if "commit" in row]
    assert len(commits) == 3 * count
    for row in commits:
        for path, text in row["files"].items():
            assert registry.read("org/shared", row["commit"], path) == text.encode()
    if older:
        assert [row["refused"] for row in rows if "refused" in row] == [0, 0, 0]
    registry.collect(older=0)
    assert registry.check().damaged == ()
