"""``hubkit outdated``."""

from __future__ import annotations

from pathlib import Path

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, table
from hubkit.verbs.outdated import Outdated, outdated


@declare("outdated")
@click.argument("lock", type=click.Path(path_type=Path), default=".")
@click.option("--offline", is_flag=True, help="Ask nobody: compare folders alone.")
@registry_option
@json_option
def command(lock: Path, offline: bool, registry: str | None) -> None:
    """Show what is pinned, what its reference means now, and the newest there is.

    LOCK is hubkit.lock or its folder. WANTED is within the range that the recipe asks for: `hubkit lock --upgrade`
    moves there. NEWEST is the highest version of all, pre-releases aside. Nothing changes.

    Example:
      hubkit outdated
    """
    emit(outdated(lock, registry=registry, offline=offline), _render)


def _render(rows: tuple[Outdated, ...]) -> str:
    lines = [(one.name, one.pinned, one.wanted or "-", one.newest or "-", _state(one), one.source) for one in rows]
    text = table(lines, head=("NAME", "PINNED", "WANTED", "NEWEST", "STATE", "SOURCE"))
    behind = [one.name for one in rows if one.state == "behind"]
    return text + (f"\nnext: hubkit lock --upgrade {','.join(behind)}" if behind else "")


def _state(one: Outdated) -> str:
    text = f"{one.state}: {one.why}" if one.why else one.state
    return f"{text} (pinned version yanked: {one.yanked})" if one.yanked else text
