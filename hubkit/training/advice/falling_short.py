"""What to change where no way to train fits: the smallest there is, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable

from hubkit.training.advice.choosing import Choice

GPUS = (2, 4, 8, 16, 32, 64)
SHORTEST = 32
"""Tokens below which rows are hardly rows."""

Needs = Callable[[Choice, int, int], int]
"""(a way, tokens of a row, processes) -> bytes on one process."""


def described(way: Choice) -> str:
    """A way to train, in words."""
    words = [way.method, "one row at a time" if way.batch_size == 1 else f"{way.batch_size} rows at a time"]
    words += ["activations computed again"] if way.checkpointing else []
    return ", ".join(words + (["the base divided among the processes"] if way.shard else []))


def changes(smallest: Choice, needs: Needs, limit: int, tokens: int, processes: int, divides: bool) -> list[str]:
    """What would make the smallest way fit, each alone: shorter rows, more GPUs, more memory.

    Args:
        needs: plans it.
        limit: bytes that there are.
        tokens: of the longest row.
        processes: that there are.
        divides: the base can be divided among processes, on GPUs.
    """
    found: list[str] = []
    shorter = tokens // 2
    while shorter >= SHORTEST and needs(smallest, shorter, processes) > limit:
        shorter //= 2
    if shorter >= SHORTEST:
        found.append(f"rows of at most {shorter} tokens (hubkit train --max-length {shorter} --truncate)")
    if divides:
        more = (count for count in GPUS if count > processes and needs(smallest, tokens, count) <= limit)
        found += [f"--gpus {count}" for count in [next(more, 0)] if count]
    return [*found, f"{_gb(smallest.total)} of memory", "a smaller base"]


def _gb(count: int) -> str:
    """Rounded up, to three digits, so that it suffices."""
    gb = count / 1e9
    step = 1 if gb >= 100 else 10 if gb >= 10 else 100
    return f"{-(-gb * step // 1) / step:g} GB"
