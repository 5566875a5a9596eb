"""What a method says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hubkit.errors import HubkitError

TRAITS = {
    "low-rank": "a small change of each chosen weight, with a rank",
    "quantized-base": "the base lies in memory in 4 bits",
    "whole-weights": "weights of the base are trained as they are",
    "prompt": "a few learned tokens in front of the text, and nothing else",
}
"""Trait -> what it says. `hubkit advise` chooses by them: the host knows no method by name."""


@dataclass(frozen=True)
class MethodInfo:
    """A method's description: data alone; what is asked of a method stands in `hubkit.methods.hookspecs`.

    Args:
        name: the name of its entry point.
        summary: one line.
        config: a frozen dataclass, the method's configuration; a docstring or comment per field is its documentation.
        paper: where the formulas come from.
        identity: a fresh adapter changes nothing.
        unmergeable: why it cannot be merged into a weight; empty when it can.
        recipe: training defaults that the paper or measurements found to matter (``learning_rate``, ...), where the
            hook ``recipe_for`` says nothing better for a base.
        sources: where the recipe's values come from.
        kinds: kinds of sites it can act at.
        traits: what it is to someone who chooses a method; of `TRAITS`.
    """

    name: str
    summary: str
    config: type[Any]
    paper: str
    identity: bool = True
    unmergeable: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    sources: str = ""
    kinds: tuple[str, ...] = ("linear",)
    traits: tuple[str, ...] = ()


class NotMergeable(HubkitError):
    """Raised by a method whose change of this weight cannot be written as an addition to it.

    Args:
        reason: one sentence, shown to the user.
    """

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(
            "HK-NOT-MERGEABLE",
            reason,
            where=where,
            fix="keep the adapter beside its base: hubkit generate, hubkit deploy",
        )
