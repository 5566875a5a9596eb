"""The gate of a training: what is measured when the last step is done, and what must hold before anything is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.gates import Gate, parse_gates, require_known, require_measured, require_passed
from hubkit.errors import USAGE, HubkitError
from hubkit.training.tasks.names import CAUSAL_LM

if TYPE_CHECKING:
    import torch

    from hubkit.tensors.live.attached import Attached
    from hubkit.training.measuring.figures import Asked
    from hubkit.training.rows.encode import Row
    from hubkit.training.tasks.task import Task


@dataclass(frozen=True)
class TaskRows:
    """Held-out rows of a task with figures of its own: these are measured whether there are gates or not.

    Args:
        batch_size: rows per forward pass.
    """

    task: Task
    rows: Sequence[Row]
    batch_size: int


@dataclass
class Judge:
    """Measures an adapter that was trained, and holds it against gates.

    Args:
        gates: what must hold.
        general: rows that forgetting is measured on; None: hubkit's own.
        heldout: name of the file of held-out rows; None: a share of the training rows, or none.
        wanted: whether anything is measured.
        figures: what was measured; None before.
    """

    gates: tuple[Gate, ...]
    general: Path | None
    heldout: str | None
    wanted: bool
    asked: Asked | TaskRows | None = None
    figures: dict[str, Any] | None = None

    @classmethod
    def of(
        cls,
        require: str | None,
        general: Path | str | None,
        held: Path | str | None,
        share: float | None,
        task: str | None = None,
    ) -> Judge:
        """Before anything is read: ``HK-GATE`` for gates that cannot be read, or on what will not be measured.

        Args:
            held, share: the validation rows, one way or the other.
            task: with figures of its own, whose names `prepare` knows.
        """
        gates = parse_gates(require)
        fix = "--validation 0.1, or --validation-data ROWS"
        if task in (None, CAUSAL_LM):
            require_measured(gates, heldout=bool(held or share), tasks=False, fix=fix)
        elif gates and not (held or share):
            what, have = "a gate needs held-out rows, and there are none", [gate.figure for gate in gates]
            raise HubkitError("HK-GATE", what, have=have, fix=fix, status=USAGE)
        path = None if general is None else Path(general)
        return cls(gates, path, Path(held).name if held else None, bool(gates) or general is not None)

    def prepare(
        self,
        task: Task | None,
        validation: Sequence[Row],
        batch_size: int,
        tokenizer: Any,
        base: Path,
        front: int,
        raw: bool,
    ) -> None:
        """Reads the general rows, before the first step; of a task with figures of its own the validation rows are all.

        Args:
            task: None for language modelling.
            batch_size: rows per forward pass, of a task.

        Raises:
            HubkitError: ``HK-GATE`` for a gate on a figure that the task does not have; what reading and encoding rows
                raise.
        """
        from hubkit.tensors.base.decoder import context_of_folder
        from hubkit.training.measuring.figures import GENERAL, Asked, rows_to_measure
        from hubkit.training.measuring.scoring import names_of

        if task and validation:
            require_known(self.gates, names_of(task, validation))
            self.asked = TaskRows(task, validation, batch_size)
        elif self.wanted and not task:
            context, path = context_of_folder(base), self.general or GENERAL
            longest = None if context is None else context - front
            rows = rows_to_measure(path, tokenizer, longest=longest, truncate=True, raw=raw, front=front)
            names = {"general": path.name if self.general else "hubkit's general rows"}
            names |= {"heldout": self.heldout or "a share of the training rows"} if validation else {}
            self.asked = Asked(validation, rows, names)

    def judge(self, model: Attached, device: torch.device, where: str) -> None:
        """Measures what is attached, in the dtype in which it will be stored, and refuses what does not pass.

        Raises:
            HubkitError: ``HK-GATE``, ``HK-NAN``, ``HK-MEMORY``.
        """
        from hubkit.training.measuring.figures import measured
        from hubkit.training.measuring.scoring import Draws, figures_of

        if self.asked is not None:
            if isinstance(self.asked, TaskRows):
                name, one = self.heldout or "a share of the training rows", self.asked
                found = figures_of(one.task, model, one.rows, one.batch_size, Draws(), name)
            else:
                found = measured(model, self.asked, device)
            self.figures = {**found, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
            fix = "nothing was written; the checkpoint stays: --resume with another --require keeps this adapter"
            require_passed(self.gates, self.figures, where, fix)

    @property
    def scores(self) -> dict[str, float]:
        """Of a task, without their intervals: none before they are measured."""
        if not isinstance(self.asked, TaskRows) or self.figures is None:
            return {}
        held = self.figures["heldout"]
        return {n: value for n, value in held.items() if n != "loss" and not n.endswith(("_low", "_high"))}
