"""Which method and which options: the rules of `hubkit advise`, each with its source.

Methods are known by their traits alone (`hubkit.methods.info.TRAITS`), so one that is installed later is advised like
those that ship.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hubkit.training.advice.fitting import FEW_ROWS, LARGE_BATCH

FORGETS = "https://arxiv.org/abs/2405.09673"
RECOMPUTED = "https://arxiv.org/abs/1604.06174"
DIVIDED = "https://arxiv.org/abs/2304.11277"
SHARED = "https://arxiv.org/abs/2311.03285"
GUIDE = "https://platform.openai.com/docs/guides/supervised-fine-tuning"
STEP = 8
"""Rows of a step: few enough for a low rank to learn from, enough for a steady gradient."""


@dataclass(frozen=True)
class Reason:
    """One line of advice.

    Args:
        advice: what to do.
        why: the figures that say so.
        source: where the rule comes from.
    """

    advice: str
    why: str
    source: str


@dataclass(frozen=True)
class Choice:
    """A way to train.

    Args:
        method: its name.
        batch_size, accumulate: rows of a forward pass, and forward passes of a step.
        checkpointing: activations are computed again.
        shard: the base is divided among the processes.
        total: bytes on one process.
    """

    method: str
    batch_size: int
    accumulate: int
    checkpointing: bool
    shard: bool
    total: int


def ordered() -> list[str]:
    """Names of all methods that are installed, hubkit's default first."""
    from hubkit.methods.host import host

    default = host().default()
    return [default, *(name for name in host().offers() if name != default)]


def kinds() -> dict[tuple[str, ...], str]:
    """Traits -> the first method that has just these."""
    from hubkit.methods.host import host

    found: dict[tuple[str, ...], str] = {}
    for name in ordered():
        if traits := host().load(name).info.traits:
            found.setdefault(tuple(sorted(traits)), name)
    return found


Total = Callable[[str, int, bool, bool], int]
"""(method, rows of a forward pass, checkpointing, the base divided) -> bytes on one process."""


def ways(methods: list[str], total: Total, limit: int, processes: int = 1) -> Iterator[Choice]:
    """Ways to train, the best first: whole batches before small ones, and then recomputation, method by method.

    With several processes each has as many forward passes in a step, at least one, and the base is divided among
    them where it does not fit whole; learned prompts are not trained so. Where the least way of a method does not fit
    into `limit` bytes, the ways between the first and that are left out: counting one takes seconds for a large base.
    """
    from hubkit.methods.host import host

    for method in methods:
        divided = processes > 1 and "prompt" not in host().load(method).info.traits
        sizes = [size for size in (STEP, STEP // 2, STEP // 4, 1) if size == 1 or STEP // size >= processes]
        for shard in (False, True)[: 1 + divided]:

            def way(size: int, checkpointing: bool, method: str = method, shard: bool = shard) -> Choice:
                passes = -(-STEP // (size * processes)) * processes
                needed = total(method, size, checkpointing, shard)
                return Choice(method, size, passes, checkpointing, shard, needed)

            yield way(sizes[0], False)
            least = way(1, True)
            if least.total <= limit:
                between = [(size, checkpointing) for checkpointing in (False, True) for size in sizes]
                yield from (way(*one) for one in between[1:-1])
            yield least


def chosen(methods: list[str], total: Total, limit: int, processes: int = 1) -> tuple[Choice | None, Choice]:
    """The first way that fits into `limit` bytes, or None; and the smallest that was tried."""
    smallest: Choice | None = None
    for way in ways(methods, total, limit, processes):
        if way.total <= limit:
            return way, way
        if smallest is None or way.total < smallest.total:
            smallest = way
    assert smallest is not None, "there is always a method"
    return None, smallest


def candidates(rows: int, targets: int, most: int, found: dict[tuple[str, ...], str]) -> list[str]:
    """Methods to try, the best first.

    Args:
        rows, targets: to learn from.
        most: parameters of the low-rank method at its largest.
        found: as `kinds`.
    """
    prompt, whole = found.get(("prompt",)), found.get(("whole-weights",))
    low, packed = found.get(("low-rank",)), found.get(("low-rank", "quantized-base"))
    if rows < FEW_ROWS and prompt:
        return [prompt]
    wide = [whole] if targets > most and whole else []
    return [name for name in (*wide, low, packed) if name] or ordered()[:1]


def reasons(rows: int, targets: int, way: Choice, found: dict[tuple[str, ...], str], limit: str) -> list[Reason]:
    """Why it is so."""
    low, packed = found.get(("low-rank",)), found.get(("low-rank", "quantized-base"))
    whole, prompt = found.get(("whole-weights",)), found.get(("prompt",))
    own, shared = source_of(way.method), source_of(low or way.method)
    said: list[Reason] = []
    if rows < FEW_ROWS:
        why = f"{rows} rows: fewer than {FEW_ROWS} can stand in the prompt, or be chosen from"
        said.append(Reason("put examples into the prompt first", why, GUIDE))
    if way.method == prompt:
        said.append(Reason(f"then {prompt}", "a few learned tokens cannot make the base forget what it knows", own))
    if way.method == low:
        why = f"{rows:,} rows with {targets:,} target tokens fit what a low rank can hold; it learns a format or terms"
        said.append(Reason(f"train {low}", f"{why} as well as training all weights", own))
    if way.method == packed:
        said.append(Reason(f"train {packed}", f"the base in 16 bits does not fit {limit}; in 4 bits it does", own))
    if way.method == whole:
        said.append(Reason(f"train {whole}", f"{targets:,} target tokens are more than the largest rank holds", shared))
    elif whole and rows >= FEW_ROWS:
        why = "it learns most, and forgets most, with 16 bytes of memory per parameter"
        said.append(Reason(f"{whole}, or a high rank, where the last tenth counts", why, FORGETS))
    if way.checkpointing:
        said.append(Reason("compute activations again", f"without it nothing fits {limit}", RECOMPUTED))
    if way.shard:
        said.append(Reason("divide the base among the processes", f"whole it does not fit {limit}", DIVIDED))
    why = f"{way.batch_size} x {way.accumulate}; from {LARGE_BATCH} on low rank learns less"
    said.append(Reason(f"{way.batch_size * way.accumulate} rows a step", why, shared))
    if rows >= FEW_ROWS:
        why = "it may know the task; a prompt costs nothing: compare its held-out loss with that of training"
        said.append(Reason("ask the base first, with a prompt", why, GUIDE))
        if low:
            why = "adapters share one base in memory, and each can be trained, tested and taken back alone"
            said.append(Reason("several tasks: one adapter each", why, SHARED))
    return said


def source_of(name: str) -> str:
    """Where a method's advice comes from: the first address in its sources, or its paper."""
    from hubkit.methods.host import host

    info = host().load(name).info
    found = re.search(r"https://[^\s),;]+", info.sources)
    return found[0] if found else info.paper
