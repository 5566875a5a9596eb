"""Insides of Python's own library, as they are from 3.11 to 3.14."""

from __future__ import annotations

import re
from typing import Any


def parsed_expression(text: str) -> list[tuple[Any, Any]]:
    """A regular expression taken apart: (operator, argument), bodies of groups and repetitions in the arguments.

    ``re._parser``: ``sre_parse`` was its public name and is deprecated since 3.11, without another one.

    Raises:
        re.error: when it is not valid.
    """
    found: list[tuple[Any, Any]] = list(re._parser.parse(text))  # type: ignore[attr-defined]
    return found
