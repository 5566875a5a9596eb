"""The click classes: a group that imports a command when it runs, and commands whose help ends with an example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from hubkit.cli.table import COMMANDS, SECTIONS
from hubkit.errors import nearest

EXAMPLE = "Example:"
_NEGATIVE = re.compile(r"-\s*(?:[\d.]+\S*\*|\.{0,2}/)")


class Command(click.Command):
    """A command whose docstring ends in an ``Example:`` block, printed last and exactly as written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        text, _, example = inspect.cleandoc(self.help or "").partition(f"\n{EXAMPLE}\n")
        self.help = text.rstrip()
        self.example = example.strip("\n")

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.example:
            formatter.write(f"\n{EXAMPLE}\n{self.example}\n")


class TermsCommand(Command):
    """A command whose arguments are terms of a sum: ``-0.5*./b`` is one of them, not an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [f" {arg}" if _NEGATIVE.match(arg) else arg for arg in args])


def declare(name: str, cls: type[Command] = Command) -> Callable[[Callable[..., Any]], Command]:
    """Decorator: the function becomes the command `name`; its docstring is the help and ends in ``Example:``."""

    def wrap(function: Callable[..., Any]) -> Command:
        context = {"help_option_names": ["-h", "--help"]}
        return click.command(name, cls=cls, context_settings=context, short_help=COMMANDS[name])(function)

    return wrap


class LazyGroup(click.Group):
    """The ``hubkit`` group. ``hubkit/cli/<name>.py`` is imported when that command runs, and not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"hubkit.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            error = click.UsageError(f"no command {args[0]!r}", ctx)
            error.possibilities = nearest(args[0], COMMANDS, 2, 0.6)  # type: ignore[attr-defined]
            raise error
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, line in commands.items()])
