"""kill -9 at random moments of push and pull: registry and store are as before or as after, and go on working."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from making import make_adapter

from hubkit.documents.drafts import scratch
from hubkit.documents.manifest import Manifest
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.store.store import Store
from hubkit.verbs.pull import pull
from hubkit.verbs.push import push
from hubkit.verbs.verify import verify

ROUNDS = 8


def killed(arguments: list[str], after: float) -> None:
    """Start a command and kill it `after` seconds; it may have ended by then."""
    process = subprocess.Popen([sys.executable, "-m", "hubkit", *arguments], stdout=subprocess.DEVNULL)
    time.sleep(after)
    process.kill()
    process.wait()


def seconds(arguments: list[str]) -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "hubkit", *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - start


@pytest.mark.slow
def test_a_killed_push_is_old_or_new(adapter: Path, registry: str, tiny_llama: Path) -> None:
    whole = seconds(["push", str(adapter), "ana/first"])
    place, pick = DirectoryRegistry(Path(registry)), random.Random(3)
    push(adapter, "ana/chat")
    for number in range(1, ROUNDS):
        before = place.refs("ana/chat")
        make_adapter(adapter, tiny_llama, seed=number, version=f"0.{number}.1")
        killed(["push", str(adapter), "ana/chat"], pick.uniform(0.5, 1.0) * whole)
        after = place.refs("ana/chat")
        tip = after.branches["main"]
        old, new = tip == before.branches["main"], place.read("ana/chat", tip, "hubkit.json")
        assert old or new == (adapter / "hubkit.json").read_bytes()
        assert set(after.tags) - set(before.tags) <= {f"v0.{number}.1"}
        done = push(adapter, "ana/chat")
        assert place.refs("ana/chat").tags[f"v0.{number}.1"] == done.commit
        assert len(place.history("ana/chat", done.commit or "")) == number + 2  # one commit a version, killed or not


@pytest.mark.slow
def test_a_killed_pull_is_nothing_or_whole(
    adapter: Path, registry: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(adapter, "ana/chat")
    whole = seconds(["pull", "ana/chat"])
    pick = random.Random(4)
    for number in range(ROUNDS):
        monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / f"home-{number}"))
        killed(["pull", "ana/chat"], pick.uniform(0.3, 1.0) * whole)
        for entry in Store().list():
            assert Manifest.read(entry.path).digest == entry.digest
        assert pull("ana/chat").path.is_dir()
        verify("ana/chat", base=str(tiny_llama))
        staging = tmp_path / f"home-{number}" / "staging"
        with scratch(staging):  # whoever works there next sweeps; a pull of what is stored does not
            pass
        assert [path.name for path in staging.iterdir() if not path.name.startswith(".")] == []
