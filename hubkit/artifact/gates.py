"""Gates: conditions on the figures of an evaluation, ``heldout.loss<1.3, forgetting<0.05``, and how they are held.

A figure is a number in the document of an evaluation, named by its path: ``heldout.perplexity_high``.
The name of a group means its ``value``, where it has one: ``forgetting``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hubkit.errors import USAGE, HubkitError, nearest

_SIGNS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_GATE = re.compile(r"\s*([A-Za-z][\w.,/-]*?)\s*(<=|>=|<|>)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?=,|\Z)")
_LOSS = [f"{name}{end}" for name in ("loss", "perplexity") for end in ("", "_low", "_high")]
HELDOUT = ("difference", *(f"{group}.{name}" for group in ("heldout", "base") for name in _LOSS))
"""Figures that need held-out rows."""
FORGETTING = tuple(f"forgetting{end}" for end in ("", ".low", ".high", ".before", ".after"))
"""Figures of the general rows."""
FIGURES = (*HELDOUT, "difference.low", "difference.high", *FORGETTING)
"""Every figure that `eval` and `train` measure; those of tasks are theirs."""
WANT = "FIGURE<NUMBER, ... with <, <=, > or >=, e.g. heldout.loss<1.3, forgetting<0.05"


@dataclass(frozen=True)
class Gate:
    """One condition: the figure's name, the sign, the number."""

    figure: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.figure} {self.sign} {self.bound:g}"

    def holds(self, value: float) -> bool:
        """Whether `value` passes; NaN never does."""
        return math.isfinite(value) and _SIGNS[self.sign](value, self.bound)


def parse_gates(text: str | None) -> tuple[Gate, ...]:
    """The gates of ``--require``; none of None.

    Raises:
        HubkitError: ``HK-GATE`` (status 2) for text that cannot be read.
    """
    if text is None:
        return ()
    found, at = [], 0
    while match := _GATE.match(text, at):
        found.append(Gate(match[1], match[2], float(match[3])))
        at = match.end()
        if at == len(text):
            break
        at += 1  # the comma
    bad = [gate.figure for gate in found if not math.isfinite(gate.bound)]
    if at != len(text) or not found or text.rstrip().endswith(",") or bad:
        have = text[at - 1 if at else 0 :].strip(" ,")[:80] or repr(text)
        raise HubkitError("HK-GATE", "the gate cannot be read", want=WANT, have=have, status=USAGE)
    return tuple(found)


def require_measured(gates: Iterable[Gate], *, heldout: bool, tasks: bool, fix: str) -> None:
    """Refuses gates on figures that will not be measured, before anything is computed.

    Args:
        heldout: there are rows of the task.
        tasks: tasks of the evaluation harness are run; the names of their figures are known when they have been.
        fix: how held-out rows are given.

    Raises:
        HubkitError: ``HK-GATE`` (status 2).
    """
    gates = [*gates]
    require_known([gate for gate in gates if not (tasks and gate.figure.startswith("tasks."))], FIGURES)
    lacking = [gate.figure for gate in gates if gate.figure.split(".")[0] in ("heldout", "base", "difference")]
    if lacking and not heldout:
        what = "a gate needs held-out rows, and there are none"
        raise HubkitError("HK-GATE", what, have=lacking, fix=fix, status=USAGE)


def require_known(gates: Iterable[Gate], figures: Sequence[str]) -> None:
    """Refuses gates on other figures than those that will be measured: ``HK-GATE`` (status 2)."""
    unknown = [gate.figure for gate in gates if gate.figure not in figures]
    if unknown:
        near = [f"{name}: near {', '.join(close)}" for name in unknown if (close := nearest(name, figures))]
        what, want, fix = "a gate names no figure", ", ".join(figures), "; ".join(near)
        raise HubkitError("HK-GATE", what, want=want, have=unknown, fix=fix, status=USAGE)


def require_passed(gates: Sequence[Gate], evaluation: Mapping[str, Any] | None, where: str, fix: str) -> None:
    """Refuses what does not pass every gate.

    Args:
        evaluation: the document; None where nothing was evaluated.

    Raises:
        HubkitError: ``HK-GATE`` with every figure that fails or is missing.
    """
    figures = dict(flat(evaluation or {}))
    failed, want, have = [], [], []
    for gate in gates:
        value = figures.get(gate.figure, figures.get(f"{gate.figure}.value"))
        if value is None or not gate.holds(value):
            failed.append(gate.figure)
            want.append(str(gate))
            have.append(f"{gate.figure} is not recorded" if value is None else f"{gate.figure} = {value:g}")
    if failed:
        what = f"{len(failed)} of {len(gates)} gates do not hold"
        raise HubkitError("HK-GATE", what, where=where, want=want, have=have, fix=fix)


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Path -> number, of all numbers of a document."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield above + name, float(value)
