"""What a run reports while it goes on, and its result: plain records; whoever listens draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hubkit.training.rows.summary import Prepared as Prepared


@dataclass(frozen=True)
class Fitted:
    """How large the adapter was made for what there is to learn; before `Started`, where its method can say.

    Args:
        chosen: option of the method -> the value that was chosen.
        parameters: numbers in the adapter.
        targets: targets in all training rows.
    """

    chosen: Mapping[str, Any]
    parameters: int
    targets: int


@dataclass(frozen=True)
class Started:
    """Before the first step. `step` is above 0 when the run goes on from a checkpoint.

    Args:
        step: steps done already.
        steps: steps of the whole run.
        steps_per_epoch: steps that see each row once.
        rows, validation_rows: number of rows.
        targets: targets in all training rows.
        parameters: numbers that are trained.
        device: where it trains, in words.
        chunked_loss: whether the loss is computed in chunks.
        machine_changes: what same bytes depend on and differs from when the checkpoint was made.
    """

    step: int
    steps: int
    steps_per_epoch: int
    rows: int
    validation_rows: int
    targets: int
    parameters: int
    device: str
    chunked_loss: bool
    machine_changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stepped:
    """After an optimizer step.

    Args:
        step, steps: done, of all.
        epoch: passes over the rows so far, a fraction.
        loss: mean over this step's targets, nats.
        learning_rate: used by this step.
        gradient_norm: before clipping.
        tokens: of this step, padding not counted.
        tokens_per_second: over the latest steps.
        seconds_left: until the last step, at the pace of the latest steps.
        memory: bytes in use: what torch holds on a GPU, else what this process has in memory.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    seconds_left: float
    memory: int = 0


@dataclass(frozen=True)
class Validated:
    """After an evaluation: mean loss over all validation targets (nats), whether it is the best so far, and scores."""

    step: int
    loss: float
    best: bool
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint of `step` is on disk."""

    step: int


@dataclass(frozen=True)
class Stopped:
    """The run ends before its last step. `reason`: "patience" or "interrupt"."""

    step: int
    reason: str


@dataclass(frozen=True)
class Metrics:
    """The result of a run.

    Args:
        steps: optimizer steps done.
        epochs: passes over the rows, a fraction.
        rows, validation_rows: number of rows.
        tokens, targets: seen in all steps, padding not counted.
        loss: mean over the targets of the last 50 steps, nats.
        untrained_loss: validation loss before the first step; the base's own, for a method that starts as the base.
        validation_loss: of the state that is kept.
        best_step: step of the best evaluation, None without evaluations.
        kept_step: step whose state is kept: `best_step` with early stopping, else the last.
        early: stopped for lack of improvement.
        seconds: wall time of this process's part of the run; not part of `to_document`.
        untrained_scores: of the validation rows before the first step, where a task has scores.
    """

    steps: int
    epochs: float
    rows: int
    validation_rows: int
    tokens: int
    targets: int
    loss: float
    untrained_loss: float | None
    validation_loss: float | None
    best_step: int | None
    kept_step: int
    early: bool
    seconds: float = 0.0
    untrained_scores: Mapping[str, float] | None = None

    def to_document(self) -> dict[str, object]:
        """All but the time, which no two runs share: for metrics.json and the manifest; None fields are left out."""
        return {k: v for k, v in asdict(self).items() if k != "seconds" and v is not None}


@dataclass(frozen=True)
class Finished:
    """After the last step; the model holds the state that is kept."""

    metrics: Metrics


Event = Prepared | Fitted | Started | Stepped | Validated | Saved | Stopped | Finished
