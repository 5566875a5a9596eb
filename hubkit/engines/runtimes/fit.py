"""What answers say of an adapter: not applied, applied at which scale, or another adapter, by its probes.

Between two stored scales a token's log-probability is read off a smooth curve through those around. The distance of
answers from a scale is the mean difference of log-probabilities (nats) over the answers' `COMPARED` likeliest tokens,
averaged over prompts. The scale that fits best is the adapter's; what is left over there says whether it is this
adapter at all. Pure Python: a readiness probe waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hubkit.documents.probes import Probes, Prompt, Row

COMPARED = 10
"""Likeliest tokens of an answer that are compared: every server gives so many."""
BOUNDS: Mapping[str, float] = {"f32": 0.01, "f16": 0.02, "bf16": 0.10, "q8_0": 0.15}
"""What rounding may do, by the dtype in which a server computes: mean difference in nats."""
DECIDABLE = 3.0
"""An adapter that does less than so many times the bound cannot be told from none."""
Answers = Sequence[Mapping[int, float]]
"""For each prompt the likeliest next tokens and their log-probabilities."""
Finding = Literal["applied", "not applied", "another scale", "rounded", "another", "undecided"]
_STEP, _FINE, _NOTHING = 1 / 16, 1 / 256, 3 / 64


@dataclass(frozen=True)
class Fit:
    """What answers say of an adapter.

    Args:
        finding: ``applied``; ``not applied``; ``another scale``; ``rounded``: at its scale, with more rounding than the
            bound allows; ``another``: at no scale near these answers; ``undecided``: the adapter does too little.
        scale: the scale that fits best.
        residual: mean difference from the answers there, nats.
        expected: the scale that was to be found.
        off: mean difference from the answers at that one.
        effect: how far the adapter moves the base's answers there: mean difference, nats.
        bound: what rounding may do.
    """

    finding: Finding
    scale: float
    residual: float
    expected: float
    off: float
    effect: float
    bound: float


def fitted(probes: Probes, answers: Answers, *, bound: float, expected: float = 1.0) -> Fit:
    """Fits the scale of an adapter to a server's answers and judges them.

    Args:
        answers: one for each prompt.
        bound: what rounding may do, one of `BOUNDS`.
        expected: the scale at which the adapter should act.
    """
    scale, residual = best_scale(probes, answers)
    off, effect = distance(probes, answers, expected), effect_of(probes, expected)
    found = Fit("undecided", scale, residual, expected, off, effect, bound)
    return replace(found, finding=_judged(probes, answers, found))


def _judged(probes: Probes, answers: Answers, found: Fit) -> Finding:
    if found.effect < DECIDABLE * found.bound:
        return "undecided"
    if found.off <= found.bound:
        return "applied"
    if found.residual > max(found.bound, found.effect / 4):
        bare = distance(probes, answers, 0.0)
        return "not applied" if bare <= min(_noise(probes), found.effect / 3) else "another"
    if abs(found.scale - found.expected) <= _STEP * found.expected:
        return "rounded"
    return "not applied" if found.scale <= _NOTHING else "another scale"


def best_scale(probes: Probes, answers: Answers) -> tuple[float, float]:
    """The scale whose answers are nearest, to 1/256, and their distance."""
    top = probes.scales[-1]
    coarse = _nearest(probes, answers, [n * _STEP for n in range(round(top / _STEP) + 1)])[0]
    low, high = max(coarse - _STEP, 0.0), min(coarse + _STEP, top)
    return _nearest(probes, answers, [low + n * _FINE for n in range(round((high - low) / _FINE) + 1)])


def _nearest(probes: Probes, answers: Answers, scales: Sequence[float]) -> tuple[float, float]:
    found = [(distance(probes, answers, scale), scale) for scale in scales]
    best, scale = min(found)
    return scale, best


def distance(probes: Probes, answers: Answers, scale: float) -> float:
    """How far answers are from those at a scale: mean difference in nats, averaged over prompts."""
    weights = _weights(probes.scales, scale)
    apart = [
        _apart(prompt, answer, _mixed(prompt, weights), probes.likeliest)
        for prompt, answer in zip(probes.prompts, answers, strict=True)
    ]
    return sum(apart) / len(apart)


def effect_of(probes: Probes, scale: float = 1.0) -> float:
    """How far the adapter at a scale is from the bare base, on the tokens likeliest with it."""
    weights = _weights(probes.scales, scale)
    answers = [dict(zip(one.tokens, _mixed(one, weights), strict=True)) for one in probes.prompts]
    return distance(probes, answers, 0.0)


def _noise(probes: Probes) -> float:
    """How far the null adapter is from the bare base: what answers may differ by without anything learnt in them."""
    return distance(probes, [dict(zip(one.tokens, one.null, strict=True)) for one in probes.prompts], 0.0)


def _apart(prompt: Prompt, answer: Mapping[int, float], row: Row, likeliest: int) -> float:
    """Mean difference of the answer's likeliest tokens from `row`.

    A token that is not among the prompt's was less likely than the last of the likeliest: it counts by that much.
    """
    known = dict(zip(prompt.tokens, row, strict=True))
    least = sorted(row, reverse=True)[likeliest - 1]
    top = sorted(answer.items(), key=lambda one: (-one[1], one[0]))[:COMPARED]
    return sum(abs(p - known[t]) if t in known else max(p - least, 0.0) for t, p in top) / len(top)


def _mixed(prompt: Prompt, weights: Sequence[float]) -> Row:
    """The row between the stored ones."""
    return tuple(
        sum(w * p for w, p in zip(weights, column, strict=True)) for column in zip(*prompt.logprobs, strict=True)
    )


def _weights(scales: Sequence[float], scale: float) -> list[float]:
    """How much each stored row counts at a scale: cubic pieces through all of them, with slopes of three each.

    Smooth where the adapter is gentle, and never far from the two rows beside it where it is not.
    """
    after = next((n for n, at in enumerate(scales) if at >= scale and n), len(scales) - 1)
    left, right = scales[after - 1], scales[after]
    t = (scale - left) / (right - left)
    made = [0.0] * len(scales)
    made[after - 1], made[after] = 1 - t, t
    if len(scales) > 2:
        made[after - 1], made[after] = (1 + 2 * t) * (1 - t) ** 2, t * t * (3 - 2 * t)
        for at, factor in ((after - 1, t * (1 - t) ** 2), (after, -t * t * (1 - t))):
            for number, slope in _slope(scales, at).items():
                made[number] += (right - left) * factor * slope
    return made


def _slope(scales: Sequence[float], at: int) -> dict[int, float]:
    """How much three rows count in the slope at a stored scale: that of the parabola through them."""
    middle = min(max(at, 1), len(scales) - 2)
    near = (middle - 1, middle, middle + 1)
    found = {}
    for one in near:
        two, three = (scales[other] for other in near if other != one)
        found[one] = (2 * scales[at] - two - three) / ((scales[one] - two) * (scales[one] - three))
    return found
