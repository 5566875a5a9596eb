"""Files that several threads read at once, each at its own place."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubkit.registry.directory.objects import open_regular


class SharedFile(io.BufferedIOBase):
    """A binary file, or bytes, whose position belongs to the thread that reads.

    Files are uploaded in threads, and hashed by others.

    Args:
        source: the bytes, or the descriptor of an open file (not closed here).
    """

    def __init__(self, source: bytes | int) -> None:
        self._source = source
        self._size = os.fstat(source).st_size if isinstance(source, int) else len(source)
        self._place = threading.local()

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """This thread's position, 0 at first."""
        return getattr(self._place, "at", 0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move this thread's position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._place.at = max(0, start + offset)
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes from this thread's position; all that are left by default."""
        at, left = self.tell(), max(0, self._size - self.tell())
        count = left if size is None or size < 0 else min(size, left)
        if isinstance(self._source, int):
            data = b"".join(_pieces(self._source, at, count))
        else:
            data = self._source[at : at + count]
        self._place.at = at + len(data)
        return data


def _pieces(descriptor: int, at: int, count: int) -> Iterator[bytes]:
    """`count` bytes of a file from `at` on; one read gives at most 2 GiB."""
    while count and (piece := os.pread(descriptor, count, at)):
        yield piece
        at, count = at + len(piece), count - len(piece)


@contextmanager
def opened(content: Path | bytes) -> Iterator[SharedFile]:
    """Bytes, or a plain file, as a `SharedFile`; HK-SYMLINK or HK-NOT-FOUND for what is no plain file."""
    if isinstance(content, bytes):
        yield SharedFile(content)
        return
    with open_regular(content) as file:
        yield SharedFile(file.fileno())


class Slice(io.BufferedIOBase):
    """Bytes ``[start, stop)`` of a shared file as a file of its own."""

    def __init__(self, file: SharedFile, start: int, stop: int) -> None:
        self._file, self._start, self._stop, self._at = file, start, stop, start

    def __len__(self) -> int:
        return self._stop - self._start

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position, 0 at first."""
        return self._at - self._start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move the position."""
        begin = {os.SEEK_SET: self._start, os.SEEK_CUR: self._at, os.SEEK_END: self._stop}[whence]
        self._at = max(self._start, begin + offset)
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes from the position; all that are left by default."""
        left = max(0, self._stop - self._at)
        self._file.seek(self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data
