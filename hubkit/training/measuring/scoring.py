"""The figures of a task on held-out rows, beside what the adapter is held against, and how sure they are.

Rows are drawn again with what was said of them (see `hubkit.training.measuring.intervals`). A head of the base's own
files is held against: the base with it. A head that was made knows nothing before it is trained; there it is the one
answer that is right most often, where the task has such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hubkit.errors import HubkitError
from hubkit.tensors.live.attached import Attached
from hubkit.training.measuring.intervals import between, drawn
from hubkit.training.rows.batching import collate, plan_evaluation
from hubkit.training.rows.encode import Row, rows_digest
from hubkit.training.tasks.task import Task

ENDS = ("", "_low", "_high")


@dataclass(frozen=True)
class Draws:
    """How often rows are drawn again, and by which seed."""

    samples: int = 1000
    seed: int = 0


def against(task: Task, rows: Sequence[Row]) -> str | None:
    """What an adapter is held against: ``base``, ``constant`` (the commonest answer), or None: nothing."""
    if not task.model.made:
        return "base"
    return None if task.constant(rows) is None else "constant"


def names_of(task: Task, rows: Sequence[Row]) -> tuple[str, ...]:
    """The figures that `figures_of` measures, as gates name them."""
    found = [f"heldout.{name}" for name in ("loss", *_with_ends(task.measures))]
    other = against(task, rows)
    if other is not None:
        found += [f"{other}.{name}" for name in (*(("loss",) if other == "base" else ()), *_with_ends(task.measures))]
        found += [f"difference.{name}{end}" for name in task.measures for end in ("", ".low", ".high")]
    return tuple(found)


def _with_ends(measures: Sequence[str]) -> list[str]:
    return [f"{name}{end}" for name in measures for end in ENDS]


def figures_of(
    task: Task, model: Attached, rows: Sequence[Row], batch_size: int, draws: Draws, name: str | None
) -> dict[str, Any]:
    """The figures of the active mix on `rows`, at least one.

    Args:
        name: of the file of rows, as it is recorded.

    Returns:
        ``data`` (rows, digest, name); ``heldout``: loss, and each figure of the task with the ends of its 95 %
        interval; ``base`` or ``constant`` the same of what it is held against; ``difference``: value, low, high of
        each figure, on the same draws. A task that measures rows all together has no intervals and no difference.

    Raises:
        HubkitError: ``HK-NAN``.
    """
    other, places = against(task, rows), drawn(len(rows), draws.samples, draws.seed).tolist()
    made: dict[str, Any] = {"task": task.kind, "samples": draws.samples, "seed": draws.seed}
    made["data"] = {"rows": len(rows), "digest": rows_digest(rows)} | ({"name": name} if name else {})

    def measured(loss: bool = True) -> tuple[dict[str, float], list[dict[str, float]]]:
        nats = {"loss": _short(mean_loss(task, model, rows, batch_size))} if loss else {}
        answers = task.answers(model, rows, batch_size)
        if answers is None:
            return nats | {n: _short(value) for n, value in task.measured(model, rows, batch_size).items()}, []
        figures, each = _of_draws(task, rows, answers, places)
        return nats | figures, each

    made["heldout"], after = measured()
    before: list[dict[str, float]] = []
    if other == "base":
        with model.using(None):
            made["base"], before = measured()
    elif other == "constant":
        made["constant"], before = _of_draws(task, rows, task.constant(rows) or [], places)
    if after and before:
        made["difference"] = {}
        for figure in after[0]:
            found = between(
                made["heldout"][figure] - made[str(other)][figure],
                np.array([one[figure] - two[figure] for one, two in zip(after, before, strict=True)]),
            )
            made["difference"][figure] = {k: _short(getattr(found, k)) for k in ("value", "low", "high")}
    return made


def _of_draws(
    task: Task, rows: Sequence[Row], answers: Sequence[Any], places: Sequence[Sequence[int]]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Each figure of `answers` with the ends of its interval, and the figures of each draw."""
    each = [task.scored([rows[n] for n in draw], [answers[n] for n in draw]) for draw in places]
    found: dict[str, float] = {}
    for name, value in task.scored(rows, answers).items():
        sure = between(value, np.array([one[name] for one in each]))
        found |= {f"{name}{end}": _short(v) for end, v in zip(ENDS, (sure.value, sure.low, sure.high), strict=True)}
    return found, each


def mean_loss(task: Task, model: Attached, rows: Sequence[Row], batch_size: int) -> float:
    """The mean loss over the targets of `rows`, dropout off.

    Raises:
        HubkitError: ``HK-NAN``.
    """
    step, total, device = task.train_step(_plain), 0.0, next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in plan_evaluation([len(row.ids) for row in rows], batch_size):
            some = [rows[n] for n in batch]
            total += float(step(model, collate(some, device))) * sum(row.targets() for row in some)
    if not math.isfinite(total):
        what, fix = "the loss of held-out rows is not finite", "--dtype float32"
        raise HubkitError("HK-NAN", what, want="finite numbers", have=str(total), fix=fix)
    return total / sum(row.targets() for row in rows)


def _plain(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _short(value: float) -> float:
    """Six digits: what lies below is rounding of the model's own."""
    return float(f"{value:.6g}")
