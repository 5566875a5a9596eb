"""``hubkit add``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.lock import described
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option
from hubkit.verbs.add import Added, add


@declare("add")
@click.argument("reference")
@click.option("--name", metavar="NAME", help="Its name in the recipe; by default that of the repository or folder.")
@click.option("--weight", type=float, help="Its weight in the mix; 1 by default, negative to subtract.")
@click.option(
    "--recipe", type=click.Path(path_type=Path), default="hubkit.toml", metavar="FILE", help="Default: hubkit.toml."
)
@click.option("--base", metavar="BASE", help="Make a recipe of this base where there is none.")
@click.option("--allow-base-mismatch", is_flag=True, help="Lock an adapter of another base; the lock says so.")
@click.option("--offline", is_flag=True, help="Look only at what was pulled before; ask nobody.")
@registry_option
@dry_run_option
@json_option
def command(reference: str, **options: Any) -> None:
    """Add an adapter to the recipe and lock it.

    REFERENCE is what `hubkit pull` takes, or a folder. One that the recipe has at another revision is changed to this
    one. Comments and layout of hubkit.toml stay, nothing else in hubkit.lock moves; what cannot be locked is not
    written.

    Example:
      hubkit add ana/chat@^1.2 --base HuggingFaceTB/SmolLM2-135M-Instruct
      hubkit add ./sql --weight -0.5
    """
    emit(add(reference, **options), _render)


def _render(done: Added) -> str:
    said = "would add" if done.locked.dry_run else "added"
    made = f", which {'would be' if done.locked.dry_run else 'was'} made" if done.created else ""
    return f"{said} {done.name} = {done.source} to {done.recipe}{made}\n{described(done.locked)}"
