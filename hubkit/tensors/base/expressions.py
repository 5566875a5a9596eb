"""Regular expressions out of strangers' files: compiled only where matching them cannot take for ever."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

from hubkit.compat.python import parsed_expression

_MOST = 5.0
"""Choices on one path through an expression: a repetition counts one, an option or alternative a fifth. Matching takes
the length of a name to this power at worst; the text between repetitions makes it far less in every real one."""
_FIFTH = 0.2


@functools.lru_cache(256)
def expression(text: str, longest: int = 1000) -> re.Pattern[str]:
    """`text` as an expression.

    Raises:
        re.error: when it is not valid, longer than `longest`, or could take exponential time: something that can match
            in several ways inside a repetition, or too many repetitions one after the other.
    """
    if len(text) > longest:
        raise re.error(f"longer than {longest} characters")
    try:
        compiled = re.compile(text)
        choices = _choices(parsed_expression(text))
    except (RecursionError, OverflowError) as e:
        raise re.error("too deep, or a number too large") from e
    if choices > _MOST:
        raise re.error("repetitions inside repetitions, or too many of them")
    return compiled


def _choices(parsed: Iterable[tuple[Any, Any]]) -> float:
    """The choices on the worst path; more than `_MOST` where a repetition holds one."""
    total = 0.0
    for operator, argument in parsed:
        name = str(operator)
        if name.endswith("_REPEAT"):
            low, high, body = int(argument[0]), int(argument[1]), argument[2]
            inside = _choices(body)
            if high <= 1:
                total += inside + _FIFTH * (low != high)
            elif inside:
                total += inside * high if low == high else _MOST + 1
            else:
                total += low != high
        elif name == "BRANCH":
            total += max(_choices(branch) for branch in argument[1]) + _FIFTH
        elif name == "GROUPREF":
            total += 1
        else:
            total += sum(_choices(body) for body in _bodies(argument))
    return total


def _bodies(argument: Any) -> list[Any]:
    """The expressions inside a group, an assertion, a condition."""
    parts = argument if isinstance(argument, tuple) else (argument,)
    return [part for part in parts if hasattr(part, "getwidth")]
