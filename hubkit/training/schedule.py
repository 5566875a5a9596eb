"""The learning rate as a function of the step alone, so that a resumed run needs no state of it."""

from __future__ import annotations

import math


def rate_factor(schedule: str, step: int, total: int, warmup: float) -> float:
    """The share of the highest learning rate used by optimizer step `step`.

    Rises linearly over ceil(warmup * total) steps, the first of which is above 0 and the last of which is 1;
    then falls towards 0, which would be reached one step after the last (cosine: Loshchilov & Hutter, 1608.03983).

    Args:
        schedule: "cosine", "linear" or "constant".
        step: counted from 0.
        total: steps of the whole run.
        warmup: share of the steps, in [0, 1).
    """
    rising = math.ceil(warmup * total)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
