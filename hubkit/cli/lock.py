"""``hubkit lock``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import dry_run_option, emit, json_option, registry_option, short, table
from hubkit.locking.differences import Moved
from hubkit.verbs.lock import Locked, lock

ALL = "*"
"""What ``--upgrade`` without a name stands for; no name of an entry."""


@declare("lock")
@click.argument("recipe", type=click.Path(path_type=Path), default="hubkit.toml")
@click.option("--check", is_flag=True, help="Write nothing and ask nobody: refuse when the lock is out of date.")
@click.option(
    "--upgrade",
    is_flag=False,
    flag_value=ALL,
    multiple=True,
    metavar="[NAME]",
    help="Resolve the entry NAME anew ('base' is the base); several by commas or several times; without NAME all.",
)
@click.option(
    "--diff",
    is_flag=False,
    flag_value=ALL,
    metavar="[OLD]",
    help="Write nothing; show what differs from the lock OLD to this one; without OLD, from this one to a new one.",
)
@click.option("--allow-base-mismatch", is_flag=True, help="Lock adapters of another base; the lock says so.")
@click.option("--offline", is_flag=True, help="Look only at what was pulled before; ask nobody.")
@registry_option
@dry_run_option
@json_option
def command(recipe: Path, upgrade: tuple[str, ...], diff: str | None, **options: Any) -> None:
    """Pin a recipe's base and adapters to exact commits and digests.

    RECIPE is hubkit.toml by default; hubkit.lock is written beside it. Every adapter is proven to belong to the
    base first. An entry moves only when its line in the recipe changed, or with --upgrade. Of repositories only
    manifests, listings and headers are read. Commit both files.

    Example:
      hubkit lock
      hubkit lock --check
      hubkit lock --upgrade chat --diff
    """
    names = [name for text in upgrade for name in text.split(",")]
    options |= {"upgrade": True if ALL in names else names}
    if diff == ALL:
        options["dry_run"] = True
    result = lock(recipe, **options, diff=None if diff == ALL else diff)
    emit(result, described if diff is None else differences)


def described(done: Locked) -> str:
    """What changed in a lock, what is in it now, and its digest."""
    pinned = done.lock
    rows = [("base", pinned.base.source, short(pinned.base.revision), "", "")]
    rows += [
        (one.name, one.source, short(one.revision), f"{one.weight:g}", short(one.digest)) for one in pinned.adapters
    ]
    if done.changed:
        state = ("would change" if done.dry_run else "changed") + f": {', '.join(done.changed)}"
    else:
        state = "up to date"
    lines = [f"{done.path}  {state}"]
    lines += [f"conflict  {line}; resolved anew" for line in done.lost]
    lines += [_moved(one) for one in done.moved if one.what not in ("added", "removed")]
    lines += [table(rows, head=("NAME", "SOURCE", "COMMIT", "WEIGHT", "DIGEST")), f"digest  {done.digest}"]
    return "\n".join(lines + [f"override: {name}" for name in pinned.overrides])


def differences(done: Locked) -> str:
    """What moved, one line each."""
    return "\n".join(map(_moved, done.moved)) or "no difference"


def _moved(one: Moved) -> str:
    if one.what in ("added", "removed"):
        return f"{one.name}  {one.what}: {one.before or one.after}"
    what = "" if one.what in ("version", "commit", "setting") else f" {one.what}"
    return f"{one.name}{what}  {one.before or 'none'} -> {one.after or 'none'}"
