"""Threads that nobody has to wait for: work within a time, and several pieces of work at once that Ctrl-C ends.

Python's own pools wait for their threads when they are left, and again when the interpreter ends: a thread that waits
for a silent server would hold both up. These are daemons; what they still do after they were given up on is theirs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
PATIENCE = 2.0
"""Seconds that other pieces of work get to notice that one has failed."""

_spare: list[SimpleQueue[Any]] = []
os.register_at_fork(after_in_child=_spare.clear)  # threads do not come along


class Late(Exception):
    """Work was not done in time; its thread was left to itself."""


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What `work` gives or raises, in a thread that is used again afterwards.

    Raises:
        Late: it took longer than `seconds`; Ctrl-C is not waited for either.
    """
    try:
        inbox = _spare.pop()
    except IndexError:
        inbox = SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), daemon=True).start()
    answer: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    inbox.put((work, answer))
    try:
        result, error = answer.get(timeout=seconds)
    except Empty:
        raise Late from None
    if error is not None:
        raise error
    made: Result = result
    return made


def _serve(inbox: SimpleQueue[Any]) -> None:
    while True:
        work, answer = inbox.get()
        result: tuple[Any, BaseException | None]
        try:
            result = work(), None
        except BaseException as error:  # whoever asked gets it
            result = None, error
        answer.put(result)
        del work, answer, result
        _spare.append(inbox)


def at_once(work: Callable[[Item], Result], items: Sequence[Item], workers: int, stop: threading.Event) -> list[Result]:
    """`work` of every item, several at once; the results in the order of the items.

    Args:
        workers: how many at once.
        stop: set as soon as one fails, or Ctrl-C comes: what `work` should look at now and then.

    Raises:
        BaseException: the first one that `work` raised; nothing further is begun then.
    """
    todo, done = iter(range(len(items))), SimpleQueue[tuple[int, Any, BaseException | None]]()
    turn = threading.Lock()

    def run() -> None:
        while not stop.is_set():
            with turn:
                place = next(todo, None)
            if place is None:
                return
            try:
                done.put((place, work(items[place]), None))
            except BaseException as error:
                done.put((place, None, error))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    found: dict[int, Result] = {}
    try:
        while len(found) < len(items):
            place, result, error = done.get()
            if error is not None:
                raise error
            found[place] = result
    except BaseException as error:
        stop.set()
        for thread in threads if isinstance(error, Exception) else ():
            thread.join(PATIENCE / len(threads))
        raise
    return [found[place] for place in range(len(items))]
