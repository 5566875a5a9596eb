"""``hubkit lock``."""

from __future__ import annotations

from pathlib import Path

import click

from hubkit.cli.group import declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option, short, table
from hubkit.verbs.lock import Locked, lock


@declare("lock")
@click.argument("recipe", type=click.Path(path_type=Path), default="hubkit.toml")
@click.option("--check", is_flag=True, help="Write nothing and ask nobody: refuse when the lock is out of date.")
@click.option("--upgrade", is_flag=True, help="Resolve every reference anew instead of keeping what is pinned.")
@click.option("--allow-base-mismatch", is_flag=True, help="Lock adapters of another base; the lock says so.")
@registry_option
@dry_run_option
@json_option
def command(
    recipe: Path, check: bool, upgrade: bool, allow_base_mismatch: bool, registry: str | None, dry_run: bool
) -> None:
    """Pin a recipe's base and adapters to exact commits and digests.

    RECIPE is hubkit.toml by default; hubkit.lock is written beside it. Every adapter is proven to belong to the
    base first. Of repositories only manifests, listings and headers are read. Commit both files.

    Example:
      hubkit lock
      hubkit lock --check
    """
    result = lock(
        recipe,
        check=check,
        upgrade=upgrade,
        allow_base_mismatch=allow_base_mismatch,
        registry=registry,
        dry_run=dry_run,
    )
    emit(result, _render)


def _render(done: Locked) -> str:
    pinned = done.lock
    rows = [("base", pinned.base.source, short(pinned.base.revision), "", "")]
    rows += [
        (one.name, one.source, short(one.revision), f"{one.weight:g}", short(one.digest)) for one in pinned.adapters
    ]
    if done.changed:
        state = ("would change" if done.dry_run else "changed") + f": {', '.join(done.changed)}"
    else:
        state = "up to date"
    parts = [
        f"{done.path}  {state}",
        table(rows, head=("NAME", "SOURCE", "COMMIT", "WEIGHT", "DIGEST")),
        f"digest  {done.digest}",
    ]
    return "\n".join(parts + [f"override: {name}" for name in pinned.overrides])
