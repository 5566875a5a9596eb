"""Progress of long work, on stderr: a bar on a terminal, a plain line now and then elsewhere.

On a terminal something is there within a second: what does not count yet, such as the hashing of a base, is a spinner.
A terminal that cannot move its cursor (``TERM=dumb``) gets lines.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, ClassVar

from hubkit.cli.output import note
from hubkit.documents.arguments import size
from hubkit.errors import escape

QUIET_SECONDS = 10.0
"""Off a terminal: how long between two lines, and how long work may take before its first line."""


_painting = threading.RLock()
SILENT_SECONDS = 0.8
"""On a terminal: how long nothing is shown."""


class ProgressBar:
    """One piece of long work. Off a terminal it shows nothing until `advance`, so work that was done already is silent.

    Args:
        label: what is done: ``pull ana/chat``. May come from a stranger: it is escaped, never read as markup.
        total: how much there is, when known; may be set later.
        unit: ``B`` for bytes, else a plural noun such as ``steps``.
        estimate: show the time that is left; False where the text beside it says so.
    """

    _shown: ClassVar[ProgressBar | None] = None
    """The one that is on the terminal."""

    def __init__(self, label: str, total: int | None = None, unit: str = "B", estimate: bool = True) -> None:
        self.label, self.total, self.unit, self.done, self.estimate = label, total, unit, 0, estimate
        self._timer: threading.Timer | None = None
        self._ended = False
        self._bar: Any = None
        self._task: Any = None
        self._told = time.monotonic()
        self._lines = 0

    def __enter__(self) -> ProgressBar:
        if _live():
            self._timer = threading.Timer(SILENT_SECONDS, self._spin)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with _painting:
            self._ended = True
            if self._bar is not None:
                self._take_down()
        if self._lines and kind is None:
            note(self._line(""))

    def advance(self, count: int = 1, text: str = "") -> None:
        """`count` more units are done; `text` is shown beside them (a loss, a file name)."""
        self.done += count
        if _live():
            with _painting:
                self._paint(self._line(text), self.done)
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

    def _spin(self) -> None:
        """Say that something is done, where nothing counts yet."""
        with _painting:
            if not self._ended and self._bar is None and ProgressBar._shown is None:
                self._paint("at work", 0)

    def _paint(self, line: str, done: int) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        if ProgressBar._shown is not self:
            if ProgressBar._shown is not None:
                ProgressBar._shown._take_down()  # two at once would paint over each other
            ProgressBar._shown = self
        if self._bar is None:
            from rich.console import Console

            text = TextColumn("{task.description}", markup=False)
            columns = (SpinnerColumn(), text, BarColumn(), *((TimeRemainingColumn(),) if self.estimate else ()))
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(escape(line), total=self.total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=self.total, description=escape(line))

    def _take_down(self) -> None:
        self._bar.stop()
        self._bar = None
        if ProgressBar._shown is self:
            ProgressBar._shown = None


def _live() -> bool:
    """Whether stderr is a terminal that can be painted on. While a bar is up, rich 13.0 has put there what is none."""
    return ProgressBar._shown is not None or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")
