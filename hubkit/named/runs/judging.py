"""The gate of a training: what is measured when the last step is done, and what must hold before anything is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.gates import Gate, parse_gates, require_measured, require_passed

if TYPE_CHECKING:
    import torch

    from hubkit.tensors.live.attached import Attached
    from hubkit.training.measuring.figures import Asked
    from hubkit.training.rows.encode import Row


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
    asked: Asked | None = None
    figures: dict[str, Any] | None = None

    @classmethod
    def of(cls, require: str | None, general: Path | str | None, held: Path | str | None, share: float | None) -> Judge:
        """Before anything is read: ``HK-GATE`` for gates that cannot be read, or on what will not be measured."""
        gates = parse_gates(require)
        fix = "--validation 0.1, or --validation-data ROWS"
        require_measured(gates, heldout=bool(held or share), tasks=False, fix=fix)
        path = None if general is None else Path(general)
        return cls(gates, path, Path(held).name if held else None, bool(gates) or general is not None)

    def prepare(self, validation: Sequence[Row], tokenizer: Any, base: Path, front: int, raw: bool) -> None:
        """Reads the general rows, before the first step.

        Raises:
            HubkitError: what reading and encoding rows raise.
        """
        from hubkit.tensors.base.decoder import context_of_folder
        from hubkit.training.measuring.figures import GENERAL, Asked, rows_to_measure

        if self.wanted:
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

        if self.asked is not None:
            found = measured(model, self.asked, device)
            self.figures = {**found, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
            fix = "nothing was written; the checkpoint stays: --resume with another --require keeps this adapter"
            require_passed(self.gates, self.figures, where, fix)
