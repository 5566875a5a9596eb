"""Progress of long work, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from hubkit.cli.output import note, size

QUIET_SECONDS = 10.0
"""Off a terminal: how long between two lines, and how long work may take before its first line."""


class ProgressBar:
    """One piece of long work. Shows nothing until the first `advance`, so work that was already done stays silent.

    Args:
        label: what is done: ``pull ana/chat``. May come from a stranger: it is escaped, never read as markup.
        total: how much there is, when known; may be set later.
        unit: ``B`` for bytes, else a plural noun such as ``steps``.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "B") -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self._bar: Any = None
        self._task: Any = None
        self._told = time.monotonic()
        self._lines = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._lines and kind is None:
            note(self._line(""))

    def advance(self, count: int = 1, text: str = "") -> None:
        """`count` more units are done; `text` is shown beside them (a loss, a file name)."""
        self.done += count
        if sys.stderr.isatty():
            self._draw(text)
        elif time.monotonic() - self._told >= QUIET_SECONDS:
            self._told, self._lines = time.monotonic(), self._lines + 1
            note(self._line(text))

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` units are done: for work that counts by itself; fewer than before is the next piece."""
        self.total = total
        if done < self.done:
            self.done = 0
        if done > self.done:
            self.advance(done - self.done)

    def _line(self, text: str) -> str:
        amount = size if self.unit == "B" else str
        parts = [f"{self.label}: {amount(self.done)}"]
        if self.total:
            parts.append(f"of {amount(self.total)} ({100 * self.done // self.total}%)")
        if self.unit != "B":
            parts.append(self.unit)
        return " ".join([*parts, text]).rstrip()

    def _draw(self, text: str) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        if self._bar is None:
            from rich.console import Console

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self.total)
            self._bar.start()
        self._bar.update(self._task, completed=self.done, total=self.total, description=self._description(text))

    def _description(self, text: str) -> str:
        from hubkit.errors import escape

        return escape(self._line(text))
