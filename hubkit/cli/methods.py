"""``hubkit methods``."""

from __future__ import annotations

import json

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, table
from hubkit.verbs.methods import DescribedMethod, InstalledMethod, methods


@declare("methods")
@click.argument("name", required=False)
@json_option
def command(name: str | None) -> None:
    """List the methods that are installed, or describe one.

    Methods are plugins: any package can offer some. With NAME, that method's options, defaults, paper and limits.

    Example:
      hubkit methods
      hubkit methods lora
    """
    if name is None:
        emit(methods(), _list)
    else:
        emit(methods(name), _describe)


def _list(found: tuple[InstalledMethod, ...]) -> str:
    rows = [(one.name, f"{one.distribution} {one.version}", "default" if one.default else "") for one in found]
    return table(rows, head=("METHOD", "FROM", "")) if rows else "no methods are installed"


def _describe(one: DescribedMethod) -> str:
    facts = [
        ("from", f"{one.distribution} {one.version}"),
        ("paper", one.paper),
        ("acts at", ", ".join(one.kinds)),
        ("fresh", "changes nothing" if one.identity else "changes the base's answers"),
        ("merge", f"no: {one.unmergeable}" if one.unmergeable else "yes"),
        ("PEFT", one.peft or "does not know it"),
    ]
    options = [(option.name, json.dumps(option.default), option.help) for option in one.options]
    parts = [f"{one.name}: {one.summary}", "", table(facts), "", table(options, head=("OPTION", "DEFAULT", "MEANING"))]
    if one.recipe:
        parts += ["", table([(key, str(value)) for key, value in one.recipe.items()], head=("TRAINS WITH", "DEFAULT"))]
    return "\n".join(parts)
