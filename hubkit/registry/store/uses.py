"""When each artifact of the store was last looked up: the modification time of one empty file each, set once a day.

That is enough to tell what nobody wants any more, and costs every command that names an artifact one look at a file.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

DAY = 24 * 3600.0
"""Seconds for which a note is good."""


class Uses:
    """The notes below a folder.

    Args:
        home: of the store.
    """

    def __init__(self, home: Path) -> None:
        self._folder = home / "index" / "used"

    def last(self, digest: str) -> float:
        """Seconds since 1970; 0 where no use was noted."""
        try:
            return os.stat(self._path(digest)).st_mtime
        except OSError:
            return 0.0

    def is_due(self, digest: str) -> bool:
        """Whether the last note is older than a day, or of a clock that was more than a day ahead."""
        return abs(time.time() - self.last(digest)) >= DAY

    def note(self, digest: str) -> None:
        """Note that the artifact is used now.

        Raises:
            OSError: where the store may only be read.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._path(digest).open("ab"):
            os.utime(self._path(digest))

    def forget(self, digest: str) -> None:
        """Remove a note; no error when there is none."""
        with suppress(OSError):
            self._path(digest).unlink()

    def _path(self, digest: str) -> Path:
        return self._folder / digest.removeprefix("sha256:")
