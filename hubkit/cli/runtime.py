"""The options of the commands that ask a running server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def runtime_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: ``--dtype`` and ``--timeout``, for the function's `dtype` and `timeout`."""
    for option in (
        click.option(
            "--timeout", type=float, default=30.0, show_default=True, help="Seconds that one answer may take."
        ),
        click.option(
            "--dtype",
            metavar="f32|f16|bf16|q8_0",
            help="In which answers are computed.  [default: f32, or what a lock says]",
        ),
    ):
        function = option(function)
    return function
