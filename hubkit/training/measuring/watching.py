"""Who else sees the events of a run: TensorBoard, where it is asked for, and the picture of the curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hubkit.errors import HubkitError
from hubkit.training.events import Event, Started, Stepped, Validated
from hubkit.training.measuring.curve import draw
from hubkit.training.ranks.world import world

Report = Callable[[Event], None]


@contextmanager
def watching(report: Report, run_dir: Path, board: Board | None) -> Iterator[Report]:
    """What a run is to report to, instead of `report`; the curve is drawn when it ends, however it ends.

    Args:
        run_dir: where the run writes `metrics.jsonl`.
        board: TensorBoard's files, if they are wanted.
    """

    def tell(event: Event) -> None:
        if board is not None:
            board.tell(event)
        report(event)

    try:
        yield tell
    finally:
        if board is not None:
            board.close()
        if world().first:
            with suppress(HubkitError):  # a picture hides no other fault, and is none to lose a run for
                draw(run_dir)


class Board:
    """Writes the events of a run as TensorBoard's scalars: loss, held-out loss, rate, norm, speed, memory.

    Args:
        folder: that ``tensorboard --logdir`` reads; made when the run starts.

    Raises:
        HubkitError: ``HK-EXTRA`` without the package tensorboard.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            what, fix = "--tensorboard needs the package tensorboard", "pip install 'hubkit-adapters[tensorboard]'"
            raise HubkitError("HK-EXTRA", what, have=str(error), fix=fix) from error
        self._make: Callable[..., Any] = SummaryWriter
        self._folder, self._writer = folder, None

    def tell(self, event: Event) -> None:
        """Writes what `event` says; a resumed run takes back what was written of steps that it does again."""
        if isinstance(event, Started):
            self._writer = self._make(str(self._folder), purge_step=event.step + 1 if event.step else None)
        elif isinstance(event, Stepped):
            self._add(
                event.step,
                {
                    "loss/training": event.loss,
                    "learning_rate": event.learning_rate,
                    "gradient_norm": event.gradient_norm,
                    "speed/tokens_per_second": event.tokens_per_second,
                    "memory/bytes": event.memory,
                },
            )
        elif isinstance(event, Validated):
            scores = {f"scores/{name}": value for name, value in event.scores.items()}
            self._add(event.step, {"loss/held_out": event.loss, **scores})

    def _add(self, step: int, values: dict[str, float]) -> None:
        writer: Any = self._writer
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def close(self) -> None:
        """No more events."""
        writer: Any = self._writer
        if writer is not None:
            writer.close()
