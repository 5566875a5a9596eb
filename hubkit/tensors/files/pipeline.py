"""Blocks of a file on their way from base to result, through a fixed ring of buffers.

::

    reader thread        calling thread            writer thread
    bytes of the base -> made into others, if any -> the file
                                                  -> its digest     (hasher thread)

All four work at the same time: reading, arithmetic, writing and hashing let go of the interpreter's lock. The calling
thread decides everything; the others do one thing each, in order, so an error of theirs surfaces in the calling thread
before another block is begun. A buffer is filled again when what it held has been written and hashed.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hubkit.errors import HubkitError

BUFFERS = 6
"""Two being read, one being made, the others waiting to be written and hashed."""
AHEAD = 2

Consume = Callable[[memoryview], object]


@dataclass(frozen=True)
class Piece:
    """A run of bytes that begins as bytes of a file.

    Args:
        path: the file.
        start: its first byte there.
        stop: one past its last.
        size: of the result in bytes.
        make: makes the result (its second argument, uint8) of the file's bytes (its first); None: they are the result.
    """

    path: Path
    start: int
    stop: int
    size: int
    make: Callable[[Tensor, Tensor], None] | None = None


Block = bytes | memoryview | Piece
_Reading = tuple[Tensor, Future[None]]
"""A buffer, and when it is filled."""


class Pipeline:
    """The threads and the ring: a context, for as many files as wanted.

    While it is open torch computes in one thread: the other cores are hashing and writing.
    """

    def __enter__(self) -> Pipeline:
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pools = [ThreadPoolExecutor(1, f"hubkit-{name}") for name in ("read", "write", "hash")]
        self._free: list[Tensor] = []
        self._count = 0
        self._lent: deque[tuple[Tensor | None, list[Future[object]]]] = deque()
        self._source: BinaryIO | None = None
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._torch_threads)
        if self._source is not None:
            self._source.close()

    def run(self, blocks: Iterable[Block], *consumers: Consume) -> None:
        """Hands every block's bytes to each consumer, in order, each in a thread of its own; returns when all is done.

        Args:
            blocks: taken a few ahead.
            consumers: at most two.

        Raises:
            HubkitError: ``HK-SAFETENSORS`` for a file that ends too early; what consumers and `Piece.make` raise.
        """
        pending: deque[tuple[Block, _Reading | None]] = deque()
        for block in blocks:
            pending.append((block, self._begin(block) if isinstance(block, Piece) else None))
            if len(pending) > AHEAD:
                self._finish(*pending.popleft(), consumers)
        while pending:
            self._finish(*pending.popleft(), consumers)
        while self._lent:
            self._wait()

    def _begin(self, piece: Piece) -> _Reading:
        buffer = self._take(piece.stop - piece.start)
        return buffer, self._pools[0].submit(self._read, piece, _view(buffer, piece.stop - piece.start))

    def _finish(self, block: Block, reading: _Reading | None, consumers: tuple[Consume, ...]) -> None:
        buffer = None
        if isinstance(block, Piece):
            assert reading is not None
            buffer, read = reading
            read.result()
            if block.make is not None:
                made = self._take(block.size)
                block.make(buffer[: block.stop - block.start], made[: block.size])
                self._free.append(buffer)
                buffer = made
            view = _view(buffer, block.size)
        else:
            view = memoryview(block)
        pools = self._pools[1:]
        self._lent.append((buffer, [pool.submit(use, view) for pool, use in zip(pools, consumers, strict=False)]))
        while len(self._lent) > BUFFERS or (self._lent and all(future.done() for future in self._lent[0][1])):
            self._wait()

    def _take(self, size: int) -> Tensor:
        """A buffer of at least `size` bytes; waits for one when all are out."""
        while not self._free and self._count == BUFFERS:
            self._wait()
        if not self._free:
            self._count += 1
            return _buffer(size)
        buffer = self._free.pop()
        return buffer if buffer.numel() >= size else _buffer(size)

    def _wait(self) -> None:
        """Until the oldest block is used up."""
        buffer, futures = self._lent.popleft()
        for future in futures:
            future.result()
        if buffer is not None:
            self._free.append(buffer)

    def _read(self, piece: Piece, view: memoryview) -> None:
        """In the reader's thread: fills `view`."""
        if self._source is None or self._source.name != str(piece.path):
            if self._source is not None:
                self._source.close()
            self._source = open(str(piece.path), "rb", 0)  # noqa: SIM115 - kept for the pieces that follow
        self._source.seek(piece.start)
        filled = 0
        while filled < len(view):
            count = self._source.readinto(view[filled:])  # type: ignore[attr-defined]
            if not count:
                raise HubkitError("HK-SAFETENSORS", "the file is cut off", where=str(piece.path))
            filled += count


def _buffer(size: int) -> Tensor:
    """Memory of the system's own: given back for good, which malloc's may not be, and taken a page at a time."""
    own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
    return torch.frombuffer(mmap.mmap(-1, 1 << max(12, (size - 1).bit_length()), **own), dtype=torch.uint8)


def _view(buffer: Tensor, size: int) -> memoryview:
    return memoryview(buffer.numpy().data).cast("B")[:size]
