"""Keeping a library silent that has one switch for the whole process, whatever number of threads work in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Silence:
    """A context manager, made anew by each call: the first thread in silences, the last one out restores.

    Args:
        silence: does it, and gives back what undoes it.
    """

    def __init__(self, silence: Callable[[], Callable[[], None]]) -> None:
        self._silence = silence
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] = lambda: None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Silent inside."""
        with self._lock:
            if self._inside == 0:
                self._restore = self._silence()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._restore()
