"""The bytes of one file on their way to disk: gone on with where they broke off, hashed by another thread meanwhile."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from queue import Queue
from typing import IO

from hubkit.registry.api import Arrived
from hubkit.registry.hub.listing import Expected

BLOCK = 256 << 10
"""Bytes that are written at once: what a kill loses at most."""
SMALL = 1 << 20
"""Files up to so many bytes are hashed in the same thread."""
WAITING = 16


class Hashing:
    """A file's digests, computed beside whatever brings its bytes.

    Args:
        size: bytes of the file.
        named: git's name is wanted, too.
    """

    def __init__(self, size: int, named: bool) -> None:
        self.sha256 = hashlib.sha256()
        self.blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if named else None
        self._blocks: Queue[bytes | None] | None = Queue(WAITING) if size > SMALL else None
        if self._blocks is not None:
            self._thread = threading.Thread(target=self._run, args=(self._blocks,), daemon=True)
            self._thread.start()

    def update(self, block: bytes) -> None:
        """Take the next bytes."""
        if self._blocks is None:
            self._take(block)
        else:
            self._blocks.put(block)

    def end(self) -> None:
        """Return when all is taken in; nothing can follow."""
        if self._blocks is not None:
            self._blocks.put(None)
            self._thread.join()
            self._blocks = None

    def _take(self, block: bytes) -> None:
        self.sha256.update(block)
        if self.blob is not None:
            self.blob.update(block)

    def _run(self, blocks: Queue[bytes | None]) -> None:
        while (block := blocks.get()) is not None:
            self._take(block)


class Transfer:
    """One file; `accept` may be called several times, each goes on where the last one broke off.

    Args:
        out: open for reading and writing, unbuffered; what is in it is taken for the file's beginning.
        want: what the file must be.
        progress: of bytes that are there, those of the beginning too; taken back when it begins anew.
    """

    def __init__(self, out: IO[bytes], want: Expected, progress: Arrived | None) -> None:
        self._out = out
        self._want = want
        self._progress = progress or (lambda count: None)
        self._size = 0
        self._hashing = self._fresh()
        for block in iter(lambda: out.read(BLOCK), b""):
            self._hashing.update(block)
            self._size += len(block)
        if self._size > want.size:
            self._size = 0  # what lies there is no beginning of it
            self.restart()
        self._progress(self._size)

    def restart(self) -> None:
        """Begin anew."""
        if self._size:
            self._progress(-min(self._size, self._want.size))
        self._out.seek(0)
        self._out.truncate()
        self._size = 0
        self._hashing.end()
        self._hashing = self._fresh()

    @property
    def complete(self) -> bool:
        """Whether as many bytes are there as there should be."""
        return self._size == self._want.size

    def headers(self) -> dict[str, str]:
        """Ask for the rest when some of it is here."""
        return {"Range": f"bytes={self._size}-"} if 0 < self._size < self._want.size else {}

    def accept(self, status: int, content_range: str, pieces: Iterable[bytes]) -> None:
        """Take what one answer brings."""
        begins = re.match(r"bytes (\d+)-", content_range)
        if not (status == 206 and begins and int(begins[1]) == self._size):
            self.restart()
        for block in _blocks(pieces):
            if self._size + len(block) > self._want.size:
                self._size += len(block)
                return  # `fault` tells; a server must not fill the disk
            view = memoryview(block)
            while view:
                view = view[self._out.write(view) :]
            self._size += len(block)
            self._hashing.update(block)
            self._progress(len(block))

    def fault(self) -> tuple[str, str] | None:
        """What was wanted and what came, when they differ; otherwise the file is made durable."""
        want = self._want
        self._hashing.end()
        if self._size != want.size:
            more = "more than " if self._size > want.size else ""
            return f"{want.size} bytes", f"{more}{min(self._size, want.size)} bytes"
        if want.sha256 is not None and self.digest != f"sha256:{want.sha256}":
            return f"sha256:{want.sha256}", self.digest
        blob = self._hashing.blob
        if want.oid is not None and blob is not None and blob.hexdigest() != want.oid:
            return f"git blob {want.oid}", f"git blob {blob.hexdigest()}"
        os.fsync(self._out.fileno())
        return None

    def end(self) -> None:
        """Let go of the thread that hashes."""
        self._hashing.end()

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the bytes, after `fault` found nothing wrong."""
        return f"sha256:{self._hashing.sha256.hexdigest()}"

    def _fresh(self) -> Hashing:
        return Hashing(self._want.size, self._want.oid is not None)


def _blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in larger pieces; what came before an error is given out before it is raised."""
    held: list[bytes] = []
    size = 0
    iterator = iter(pieces)
    try:
        for piece in iterator:
            held.append(piece)
            size += len(piece)
            if size >= BLOCK:
                yield b"".join(held)
                held, size = [], 0
    except GeneratorExit:
        raise
    except BaseException:
        if held:
            yield b"".join(held)
        raise
    if held:
        yield b"".join(held)
