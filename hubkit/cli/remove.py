"""``hubkit remove``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.lock import described
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option
from hubkit.verbs.remove import Removed, remove


@declare("remove")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option(
    "--recipe", type=click.Path(path_type=Path), default="hubkit.toml", metavar="FILE", help="Default: hubkit.toml."
)
@click.option("--offline", is_flag=True, help="Look only at what was pulled before; ask nobody.")
@registry_option
@dry_run_option
@json_option
def command(names: tuple[str, ...], **options: Any) -> None:
    """Take adapters out of the recipe and its lock.

    NAME is the name in hubkit.toml. Comments and layout stay, nothing else in hubkit.lock moves. What was pulled stays
    in the store.

    Example:
      hubkit remove sql
    """
    emit(remove(names, **options), _render)


def _render(done: Removed) -> str:
    said = "would remove" if done.locked.dry_run else "removed"
    return f"{said} {', '.join(done.names)} from {done.recipe}\n{described(done.locked)}"
