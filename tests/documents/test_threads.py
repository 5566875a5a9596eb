"""Threads that nobody waits for: results come back in order, what takes too long is left, Ctrl-C is not held up."""

from __future__ import annotations

import threading
import time

import pytest

from hubkit.documents.threads import Late, at_once, within


def test_within_gives_what_the_work_gives_or_raises() -> None:
    assert within(20, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(20, lambda: 1 // 0)
    names = {within(20, lambda: threading.current_thread().name) for _ in range(20)}
    assert threading.current_thread().name not in names
    assert len(names) < 20, "threads are used again"


def test_work_that_takes_too_long_is_left_to_itself() -> None:
    held, ended = threading.Event(), threading.Event()

    def work() -> None:
        held.wait(20)
        ended.set()

    begun = time.monotonic()
    with pytest.raises(Late):
        within(0.05, work)
    assert time.monotonic() - begun < 10
    held.set()
    assert ended.wait(20)


def test_at_once_keeps_the_order_and_the_number_of_workers() -> None:
    busy, most, turn = [0], [0], threading.Lock()

    def work(number: int) -> int:
        with turn:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.01)
        with turn:
            busy[0] -= 1
        return number * number

    assert at_once(work, range(20), 3, threading.Event()) == [number * number for number in range(20)]
    assert 1 < most[0] <= 3
    assert at_once(work, [], 3, threading.Event()) == []


def test_the_first_failure_stops_the_rest() -> None:
    stop, begun = threading.Event(), []

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise KeyError(number)
        stop.wait(20)

    with pytest.raises(KeyError):
        at_once(work, range(100), 4, stop)
    assert stop.is_set()
    assert len(begun) <= 5
