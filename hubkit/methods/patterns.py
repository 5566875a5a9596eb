"""Options that differ by module, PEFT's way: a mapping of expressions to values, first match wins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from hubkit.errors import HubkitError
from hubkit.tensors.base.expressions import expression

T = TypeVar("T")
_LONGEST = 200


def pattern_value(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches module `name` as ``(.*\\.)?(pattern)$``, else `default`.

    Raises:
        HubkitError: ``HK-PATTERN`` for an expression that is not valid, too long, or can take exponential time:
            patterns come from files of strangers.
    """
    for pattern, value in patterns.items():
        try:
            expression(pattern, _LONGEST)  # by itself: a pattern cannot close the group around it
            if re.match(rf"(?:.*\.)?(?:{pattern})$", name):
                return value
        except re.error as e:
            raise HubkitError(
                "HK-PATTERN",
                "a rank or alpha pattern is not a usable expression",
                where=pattern[:80],
                have=str(e),
                fix="use module names: q_proj, model.layers.0.mlp.up_proj",
            ) from e
    return default
