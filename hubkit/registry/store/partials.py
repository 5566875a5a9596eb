"""Large files that have begun to arrive: each grows under its own digest, and whoever pulls it next goes on with it.

``partial/<64 hex>`` lies beside the staging area, which is swept: for its owner alone, locked while it grows. What is
in it is proven by nobody until the whole file has its digest; then it is renamed away.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hubkit.documents.drafts import held
from hubkit.errors import HubkitError

OLD = 7 * 24 * 3600
"""Seconds after which a file that nobody went on with is removed."""


class Partials:
    """The files below a folder that are on their way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def growing(self, digest: str) -> Iterator[Path | None]:
        """Where the file of this digest grows, nobody else's meanwhile; None when another process, or user, has it."""
        path = self._folder / digest.removeprefix("sha256:")
        with ExitStack() as stack:
            mine = False
            with suppress(HubkitError, OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_alone(path))
                mine = _ours(path)
            yield path if mine else None

    def sweep(self, older: float = OLD, *, dry_run: bool = False) -> int:
        """Remove what has not grown for `older` seconds.

        Args:
            dry_run: only count it.

        Returns:
            the bytes that came free.
        """
        total = 0
        with suppress(OSError):
            for path in [*self._folder.iterdir()]:
                info = path.lstat()
                if path.suffix == ".lock" or time.time() - info.st_mtime < older:
                    continue
                with suppress(HubkitError, OSError), _alone(path):
                    if not dry_run:
                        path.unlink()
                    total += info.st_size
        return total


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    busy = HubkitError("HK-BUSY", "another pull fetches this file", where=str(path))
    with held(path.with_name(f"{path.name}.lock"), busy):
        yield


def _ours(path: Path) -> bool:
    """Whether it can be gone on with: not there yet, or a file of our own, which nobody else can change afterwards."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return True
    own = not hasattr(os, "geteuid") or info.st_uid == os.geteuid()
    return stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and own
