"""Arguments of commands that take a sum or stack of adapters: ``1.0*./a + -0.5*./b``, typed without quotes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def terms_argument(function: Function) -> Function:
    """Decorator: the terms, passed as `terms`."""
    return click.argument("terms", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[WEIGHT*]ADAPTER [+ ...]")(
        function
    )


def mix_option(function: Function) -> Function:
    """Decorator: ``--mix``, passed as `mix`."""
    text = "sum: every adapter sees the base. stack: each sees what those before it made."
    return click.option("--mix", type=click.Choice(["sum", "stack"]), default="sum", show_default=True, help=text)(
        function
    )


def mismatch_option(function: Function) -> Function:
    """Decorator: ``--allow-base-mismatch``."""
    text = "Go on although an adapter was trained on another base; recorded in what is written."
    return click.option("--allow-base-mismatch", is_flag=True, help=text)(function)


def incomplete_option(function: Function) -> Function:
    """Decorator: ``--allow-incomplete-base``."""
    text = "Go on although the base's files are not the model's weights, each once; recorded."
    return click.option("--allow-incomplete-base", is_flag=True, help=text)(function)


def offline_option(function: Function) -> Function:
    """Decorator: ``--offline``."""
    return click.option("--offline", is_flag=True, help="Use only what was pulled before.")(function)


def device_option(function: Function) -> Function:
    """Decorator: ``--device``, passed as `device`."""
    text = "Where to compute: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:N or mps."
    return click.option("--device", metavar="DEVICE", default="auto", show_default=True, help=text)(function)
