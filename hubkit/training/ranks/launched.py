"""What a launcher has told this process: its number among how many. No torch is needed to know it."""

from __future__ import annotations

import os
from dataclasses import dataclass

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """A process among several.

    Args:
        rank: its number, 0 to size - 1.
        size: how many there are.
        local: its number on this machine.
    """

    rank: int
    size: int
    local: int


def launched() -> Launch | None:
    """What ``torchrun`` (or a launcher that sets the same variables) says; None for a process on its own."""
    if any(not os.environ.get(name) for name in _NEEDED):
        return None
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK") or rank)
    except ValueError:
        return None
    return Launch(rank, size, local) if size > 1 and 0 <= rank < size else None


def speaks() -> bool:
    """Whether this process prints: it is alone, or the first."""
    found = launched()
    return found is None or found.rank == 0
