"""The figures of an evaluation as a document: held-out loss beside the base's, and what was forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.device import computing
from hubkit.tensors.live.attached import Attached
from hubkit.training.attention import short_attention
from hubkit.training.measuring.intervals import Interval, difference, interval
from hubkit.training.measuring.losses import Losses, losses_of
from hubkit.training.rows.data import Columns, choose_columns, read_rows
from hubkit.training.rows.encode import Row, encode, rows_digest

GENERAL = Path(__file__).with_name("general.jsonl")
"""Short English texts on everyday subjects, written for hubkit: what forgetting is measured on by default."""
FEWEST = 100
"""Draws of rows below which an interval of 95 % says little."""


@dataclass(frozen=True)
class Asked:
    """What is measured, and how often rows are drawn for the intervals.

    Args:
        heldout: rows of the task; none: only forgetting is measured.
        general: rows that the adapter was not made for.
        names: of the two files, as they are recorded.
        samples: draws of rows.
        seed: of the draws.
    """

    heldout: Sequence[Row]
    general: Sequence[Row]
    names: Mapping[str, str] = field(default_factory=dict)
    samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        require_samples(self.samples, self.seed)


def require_samples(samples: int, seed: int) -> None:
    """Refuses numbers that cannot be: ``HK-OPTIONS``."""
    bad = [f"samples = {samples}"] if samples < FEWEST else []
    bad += [] if 0 <= seed < 1 << 32 else [f"seed = {seed}"]
    if bad:
        want = f"samples of {FEWEST} or more, a seed from 0 to {(1 << 32) - 1}"
        raise HubkitError("HK-OPTIONS", "out of range", want=want, have=bad, status=USAGE)


def rows_to_measure(
    path: Path,
    tokenizer: Any,
    columns: Columns | None = None,
    *,
    longest: int | None,
    truncate: bool = False,
    raw: bool = False,
    front: int = 0,
) -> list[Row]:
    """The rows of a file, encoded as for training.

    Args:
        longest: tokens of a row at most, beside `front` virtual ones; None where the base has no limit.

    Raises:
        HubkitError: what reading, choosing columns and encoding raise.
    """
    records = read_rows(path)
    limit = longest or 1 << 30
    return encode(
        records, tokenizer, choose_columns(records, columns), max_length=limit, truncate=truncate, raw=raw, front=front
    )


def measured(model: Attached, asked: Asked, device: torch.device) -> dict[str, Any]:
    """The figures of the active mix beside the base alone: one model in memory, which two take turns in.

    Raises:
        HubkitError: ``HK-NAN``, ``HK-MEMORY``.
    """

    def both(rows: Sequence[Row]) -> tuple[Losses, Losses]:
        with short_attention(model):
            adapted = losses_of(model, rows, device)
            with model.using(None):
                return adapted, losses_of(model, rows, device)

    draws = asked.samples, asked.seed
    made: dict[str, Any] = {"samples": asked.samples, "seed": asked.seed}
    with computing(device, "the evaluation", "shorter rows: --max-length with --truncate"):
        if asked.heldout:
            after, before = both(asked.heldout)
            made["data"] = _described(asked.heldout, asked.names.get("heldout"))
            made["heldout"] = _loss(interval(after, *draws))
            made["base"] = _loss(interval(before, *draws))
            made["difference"] = _rounded(difference(after, before, *draws))
        after, before = both(asked.general)
    made["general"] = _described(asked.general, asked.names.get("general"))
    lost = _rounded(difference(after, before, *draws))
    made["forgetting"] = lost | {"before": _short(before.mean), "after": _short(after.mean)}
    return made


def _described(rows: Sequence[Row], name: str | None) -> dict[str, Any]:
    tokens = sum(row.targets() for row in rows)
    return {"rows": len(rows), "tokens": tokens, "digest": rows_digest(rows)} | ({"name": name} if name else {})


def _loss(found: Interval) -> dict[str, float]:
    made = {"loss": found.value, "loss_low": found.low, "loss_high": found.high}
    names = ("perplexity", "perplexity_low", "perplexity_high")
    made |= {name: math.exp(value) for name, value in zip(names, list(made.values()), strict=True) if value < 700}
    return {name: _short(value) for name, value in made.items()}


def _rounded(found: Interval) -> dict[str, float]:
    return {"value": _short(found.value), "low": _short(found.low), "high": _short(found.high)}


def _short(value: float) -> float:
    """Six digits: what lies below is rounding of the model's own."""
    return float(f"{value:.6g}")
