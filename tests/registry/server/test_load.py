"""Many clients at once, and clients that want to be in the way. The figures are `tests/benchmarks/bench_serve.py`'s."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
from bench_serve import Hard, Slow, beside, load, peak, serving
from registry.server.test_users import soon

from hubkit.registry.directory.directory import DirectoryRegistry

DELAY = 0.1
"""Seconds by which somebody else may delay a request, half of them at least."""


@pytest.mark.slow
def test_many_clients_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "registry") as (place, process):
        found = load(place, 16, 800)
        memory = peak(process)
    assert found.wrong == []
    assert len(found.seconds) >= 800
    assert memory < 150
    assert found.at(0.99) < 10
    assert DirectoryRegistry(tmp_path / "registry").check().damaged == ()


@pytest.mark.slow
def test_nobody_waits_for_those_who_are_slow_or_ask_for_much(tmp_path: Path) -> None:
    with serving(tmp_path / "registry") as (place, _):
        alone = statistics.median(beside(place, 50))
        with Slow(place, 500):
            assert statistics.median(beside(place, 50)) < alone + DELAY
        with Hard(place, 4):
            assert statistics.median(beside(place, 50)) < alone + DELAY


@pytest.mark.slow
def test_a_head_that_never_ends_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path / "registry") as (place, _), Slow(place, 10) as slow:
        began = time.monotonic()
        while slow.closed < 5 and time.monotonic() - began < 40:
            time.sleep(0.5)
        assert slow.closed == 5, "the other five send a body, which may take a minute"
        assert soon(lambda: bool(beside(place, 1)))
