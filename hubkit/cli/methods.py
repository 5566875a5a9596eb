"""``hubkit methods``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, table
from hubkit.verbs.methods import DescribedMethod, InstalledMethod, NewMethod, methods


@declare("methods")
@click.argument("name", required=False)
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path))
@click.option("--new", is_flag=True, help="Write the package of a new method NAME into DIR, complete and tested.")
@json_option
def command(name: str | None, folder: Path | None, new: bool) -> None:
    """List the methods that are installed, or describe one.

    Methods are plugins: any package can offer some. With NAME, that method's options, defaults, paper and limits. With
    --new, the package of a method of your own, ready to be tested and changed.

    Example:
      hubkit methods
      hubkit methods lora
      hubkit methods --new gain ./hubkit-gain
    """
    if new and (name is None or folder is None):
        raise click.UsageError("--new takes the method's name and a folder: hubkit methods --new NAME DIR")
    if folder is not None and not new:
        raise click.UsageError(f"one method at a time; to write a new one: hubkit methods --new {name} {folder}")
    if name is not None and folder is not None:
        emit(methods(name, folder), _new)
    elif name is None:
        emit(methods(), _list)
    else:
        emit(methods(name), _describe)


def _new(made: NewMethod) -> str:
    lines = [f"written {made.path} ({made.distribution}: the method {made.name})"]
    return "\n".join([*lines, *(f"  {file}" for file in made.files), f"next: pip install -e '{made.path}[test]'"])


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
        parts += [f"source: {one.sources}"] if one.sources else []
    return "\n".join(parts)
