"""A training run on the screen: loss, tokens per second, memory and time left, as a bar or as plain lines."""

from __future__ import annotations

from types import TracebackType

from hubkit.cli.output import note
from hubkit.cli.progress import ProgressBar
from hubkit.documents.arguments import size
from hubkit.training.events import Event, Fitted, Prepared, Started, Stepped, Stopped, Validated
from hubkit.training.ranks.launched import speaks


class Drawing:
    """Called with each event of a run; a context, so that the bar is taken down."""

    def __init__(self) -> None:
        self._progress: ProgressBar | None = None

    def __enter__(self) -> Drawing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, trace)

    def __call__(self, event: Event) -> None:
        if not speaks():  # of several processes one tells
            return
        if isinstance(event, Prepared):
            for line in event.lines():
                note(line)
        elif isinstance(event, Fitted):
            chosen = ", ".join(f"{name} {value}" for name, value in event.chosen.items())
            note(f"{chosen}: {_count(event.parameters)} parameters for {_count(event.targets)} target tokens")
        elif isinstance(event, Started):
            self._progress = ProgressBar("train", event.steps, "steps", estimate=False)
            self._progress.done = event.step
            rows = f"{event.rows} rows" + (f", {event.validation_rows} held out" if event.validation_rows else "")
            note(f"training {event.parameters:,} parameters on {rows}, {event.steps} steps, on {event.device}")
            for change in event.machine_changes:
                note(f"resumed elsewhere, the bytes may differ: {change}")
        elif isinstance(event, Stepped) and self._progress is not None:
            speed, left = f"{event.tokens_per_second:.0f} tokens/s", f"{_clock(event.seconds_left)} left"
            told = f"loss {event.loss:.3f}  {speed}  {size(event.memory)}  {left}"
            self._progress.advance(event.step - self._progress.done, told)
        elif isinstance(event, Validated):
            scores = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in event.scores.items())
            note(f"step {event.step}: held-out loss {event.loss:.4f}{' (best)' if event.best else ''}{scores}")
        elif isinstance(event, Stopped) and event.reason == "interrupt":
            note(f"stopped at step {event.step}; go on with --resume")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 100_000 else f"{number:,}"
