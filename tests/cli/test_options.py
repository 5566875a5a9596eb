"""Options are handed on to verbs as they are: each is one of the verb's arguments, of a type that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

from hubkit.cli.table import COMMANDS
from hubkit.documents.arguments import fits
from hubkit.training.options import TrainGiven

SAMPLES: Mapping[str, object] = {
    "text": "x",
    "integer": 1,
    "integer range": 1,
    "float": 0.5,
    "choice": "x",
    "path": Path(),
}


def sample(option: click.Parameter) -> object:
    """A value as click gives it to the command's function."""
    if option.nargs == -1 or option.multiple:
        return ("x",)
    return True if getattr(option, "is_flag", False) else SAMPLES[option.type.name]


def taken(name: str) -> dict[str, str]:
    """The arguments of a verb -> the text of what they take."""
    verb = inspect.unwrap(getattr(import_module(f"hubkit.verbs.{name}"), name))
    given = TrainGiven.__annotations__ if name == "train" else {}
    return {**verb.__annotations__, **{key: kind.__forward_arg__ for key, kind in given.items()}}


def handed_on() -> Iterator[Any]:
    for name in COMMANDS:
        command = import_module(f"hubkit.cli.{name}").command
        own = inspect.signature(command.callback).parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values()):
            left_out = command.make_context(name, [], resilient_parsing=True).params
            options = [option for option in command.params if option.expose_value and option.name not in own]
            yield pytest.param(name, [(one.name, sample(one), left_out[one.name]) for one in options], id=name)


@pytest.mark.parametrize(("name", "options"), handed_on())
def test_an_option_is_an_argument_of_the_verb(name: str, options: list[tuple[str, object, object]]) -> None:
    arguments = taken(name)
    assert options
    for option, given, left_out in options:
        assert option in arguments
        assert fits(arguments[option], given), f"{option} {given!r}: {arguments[option]}"
        assert fits(arguments[option], left_out), f"{option} {left_out!r}: {arguments[option]}"
