"""How long a registry is waited for: for a connection, for the next bytes, and in all; each with its setting."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hubkit.compat import huggingface_hub as client
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.hub.faults import Asked, chain

SETTINGS = {
    "connect": ("HUBKIT_CONNECT_TIMEOUT", 10.0, "a connection"),
    "idle": ("HUBKIT_IDLE_TIMEOUT", 30.0, "further bytes"),
    "total": ("HUBKIT_TOTAL_TIMEOUT", 120.0, "the whole answer"),
}
"""Environment variable, seconds by default, and what is waited for."""
SLOWEST = 64 << 10
"""Bytes a second: files get a second more for each such piece."""
TRICKLE = 128
"""Bytes a second: fewer are as good as none."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds.

    Args:
        connect: to wait for a connection.
        idle: to wait for the next bytes.
        total: for one request with all its tries; a file's bytes come on top, see `for_bytes`.
    """

    connect: float
    idle: float
    total: float

    @classmethod
    def read(cls) -> Deadlines:
        """The user's settings.

        Raises:
            HubkitError: ``HK-OPTIONS`` (status 2) for one that is no number of seconds.
        """
        return cls(*(_seconds(name, default) for name, default, _ in SETTINGS.values()))

    def for_bytes(self, size: int) -> float:
        """Seconds that a file of `size` bytes may take."""
        return self.total + size / SLOWEST

    def pieces(self, response: Any, asked: Asked) -> Iterator[bytes]:
        """The body of an answer as it comes.

        Raises:
            HubkitError: ``HK-OFFLINE`` when no more than a trickle came for `idle` seconds.
        """
        since, count = time.monotonic(), 0
        for piece in client.pieces(response):
            count += len(piece)
            if (now := time.monotonic()) - since >= self.idle:
                if count < TRICKLE * self.idle:
                    raise late("idle", self.idle, asked)
                since, count = now, 0
            yield piece

    def refusal(self, error: BaseException, asked: Asked) -> HubkitError | None:
        """What an error of the HTTP library says, where it is that time is over; None for every other."""
        for link in chain(error):
            name = type(link).__name__
            if client.is_connect_timeout(link):
                return late("connect", self.connect, asked)
            if isinstance(link, TimeoutError) or name.endswith("Timeout"):
                return late("idle", self.idle, asked)
        return None


def late(kind: str, seconds: float, asked: Asked) -> HubkitError:
    """The refusal when a deadline is over.

    Args:
        kind: a key of `SETTINGS`.
    """
    name, _, what = SETTINGS[kind]
    return HubkitError(
        "HK-OFFLINE",
        "the registry does not answer in time",
        where=asked.where,
        want=f"{what} within {seconds:.4g} s",
        fix=f"run it again, with {name}=SECONDS to wait longer",
    )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e9:
        raise HubkitError("HK-OPTIONS", f"{name} is no time", want="seconds above 0", have=text[:80], status=USAGE)
    return seconds
