"""The curve of a run as a picture: `loss.svg`, drawn from `metrics.jsonl`; no clock in it, so same bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from hubkit.documents.files import write
from hubkit.training.history import HISTORY

PICTURE = "loss.svg"
WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 640, 320, 56, 36, 28
SMOOTH = 20
"""Parts of the run that one point of the smoothed line is the mean of: the latest twentieth."""
POINTS = 600
"""Points of a line at most: more than pixels show nothing."""

Point = tuple[float, float]


def draw(run_dir: Path) -> None:
    """Writes `loss.svg` beside the metrics; nothing where no step is done."""
    steps, held = _read(run_dir / HISTORY)
    if steps:
        write(run_dir / PICTURE, picture(steps, held).encode())


def picture(steps: Sequence[Point], held: Sequence[Point]) -> str:
    """An SVG of the training loss (thin: each step; thick: smoothed) and the held-out loss (dots).

    Args:
        steps, held: (step, loss in nats), in order.
    """
    smooth = _smoothed(steps)
    losses = [loss for _, loss in (*steps, *held)]
    low, high = min(losses), max(losses)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    last = max(1.0, *(step for step, _ in (*steps, *held)))

    def place(point: Point) -> str:
        x = LEFT + (WIDTH - LEFT - 16) * point[0] / last
        y = ABOVE + (HEIGHT - ABOVE - BELOW) * (high - point[1]) / (high - low)
        return f"{x:.1f},{y:.1f}"

    def line(points: Sequence[Point], style: str) -> str:
        every = math.ceil(len(points) / POINTS)
        kept = [*points[::every], points[-1]]
        return f'<polyline fill="none" {style} points="{" ".join(map(place, kept))}"/>'

    def text(x: float, y: float, words: str, end: str = "end") -> str:
        return f'<text x="{x:g}" y="{y:g}" text-anchor="{end}">{words}</text>'

    bottom = HEIGHT - BELOW
    made = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT} {ABOVE}V{bottom}H{WIDTH - 16}" fill="none" stroke="black"/>',
        *(text(LEFT - 6, ABOVE + (bottom - ABOVE) * n / 4 + 4, f"{high - (high - low) * n / 4:.3g}") for n in range(5)),
        text(LEFT, bottom + 18, "0", "middle"),
        text(WIDTH - 16, bottom + 18, f"step {last:g}"),
        text(LEFT, 16, "loss, nats a token: training" + (", held-out (dots)" if held else ""), "start"),
        line(steps, 'stroke="#9bbcdb" stroke-width="1"'),
        line(smooth, 'stroke="#1f5f9e" stroke-width="2"'),
    ]
    if held:
        made.append(line(held, 'stroke="#c0392b" stroke-width="1"'))
        spots = [place(point).split(",") for point in held]
        made += [f'<circle cx="{x}" cy="{y}" r="3" fill="#c0392b"/>' for x, y in spots]
    return "\n".join([*made, "</svg>"]) + "\n"


def _smoothed(steps: Sequence[Point]) -> list[Point]:
    width, total, made = max(1, len(steps) // SMOOTH), 0.0, list[Point]()
    for number, (step, loss) in enumerate(steps):
        total += loss - (steps[number - width][1] if number >= width else 0.0)
        made.append((step, total / min(width, number + 1)))
    return made


def _read(path: Path) -> tuple[list[Point], list[Point]]:
    """(step, loss) of the steps, and of the evaluations; half a line, which a kill left behind, is none."""
    steps, held = list[Point](), list[Point]()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            own = "validation_loss" in entry
            (held if own else steps).append((float(entry["step"]), float(entry["validation_loss" if own else "loss"])))
        except (ValueError, LookupError, TypeError):
            continue
    return steps, held
