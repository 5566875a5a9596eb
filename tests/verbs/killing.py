"""Kills a verb at random moments, many times: ``python killing.py VERB BASE ROWS ADAPTER FOLDER SEED``.

Everything is imported once; each attempt is a fork of this process, so that what is killed is the work and not the
start of an interpreter. After each kill the folder is looked at: old state or new one, nothing else. Prints the number
of kills that hit the work, then "same" when what came of it in the end is what an undisturbed run gave.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401 - loaded before the forks
from variants import tree

import hubkit
from hubkit.artifact.folder import open_adapter
from hubkit.registry.store.store import Store  # noqa: F401
from hubkit.training.loop import fit  # noqa: F401


def attempt(work: Callable[[], object], after: float) -> bool:
    """Runs `work` in a fork and kills it `after` seconds; whether it ended by itself."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "failed by itself"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def duration(work: Callable[[], object]) -> float:
    """Seconds that an undisturbed run takes in a fork."""
    begun = time.monotonic()
    assert attempt(work, 600.0)
    return time.monotonic() - begun


def kill_training(base: str, rows: str, folder: Path, chance: random.Random) -> int:
    """Killed again and again and resumed each time, until one run comes through."""

    def train(out: Path) -> Any:
        config = {"rank": 2, "dropout": 0.1}
        return hubkit.train(
            base, rows, out, steps=30, save_every=3, validation=0.2, eval_every=5, config=config, resume=True
        )

    whole = duration(lambda: train(folder / "whole" / "chat"))
    out, kills = folder / "killed" / "chat", 0
    while not attempt(lambda: train(out), chance.uniform(0.05, 0.7) * whole if kills < 12 else 600.0):
        kills += 1
        assert not out.exists() or open_adapter(out)
        loose = {path.name for path in out.parent.iterdir()} - {"chat", "chat.run"} if out.parent.exists() else set()
        assert all(name.startswith(".chat.") for name in loose), loose
    compare(folder / "whole" / "chat", out)
    return kills


def kill_merging(base: str, adapter: str, folder: Path, chance: random.Random) -> int:
    """A checkpoint is replaced by another, and killed: what is there is the one or the other, whole."""
    out = folder / "merged"
    weights = (1.0, -2.0)
    states = []
    for number, weight in enumerate(weights):
        hubkit.merge(base, {adapter: weight}, folder / str(number) / "merged")
        states.append(tree(folder / str(number) / "merged"))
    hubkit.merge(base, {adapter: weights[0]}, out)
    assert tree(out) == states[0]
    whole = duration(lambda: hubkit.merge(base, {adapter: weights[1]}, out, replace=True))
    kills = 0
    for number in range(24):
        work = partial(hubkit.merge, base, {adapter: weights[number % 2]}, out, replace=True)
        finished = attempt(work, chance.uniform(0.0, 1.1) * whole)
        kills += not finished
        assert tree(out) in states, "neither the old one nor the new one"
        open_adapter(out)
    hubkit.merge(base, {adapter: weights[1]}, out, replace=True)
    assert tree(out) == states[1]
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["0", "1", "merged"], left
    return kills


def compare(one: Path, two: Path) -> None:
    assert tree(one) == tree(two), "other bytes"
    left = {path.name for path in two.parent.iterdir()}
    assert left == {"chat", "chat.run"}, left


def main() -> None:
    verb, base, rows, adapter, folder, seed = sys.argv[1:]
    torch.set_num_threads(1)
    chance = random.Random(int(seed))
    if verb == "train":
        kills = kill_training(base, rows, Path(folder), chance)
    else:
        kills = kill_merging(base, adapter, Path(folder), chance)
    print(kills, "same")


if __name__ == "__main__":
    main()
