"""``hubkit yank``."""

from __future__ import annotations

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.verbs.yank import Yanked, yank


@declare("yank")
@click.argument("reference", metavar="ORG/NAME@VERSION")
@click.option("--reason", metavar="TEXT", help="One line for those who use it all the same.")
@click.option("--undo", is_flag=True, help="Give it again.")
@registry_option
@json_option
def command(reference: str, reason: str | None, undo: bool, registry: str | None) -> None:
    """Take a version back: ranges no longer choose it, locks keep it.

    Nothing is deleted: who names the version or its commit gets it, and is told the reason. It is written down in
    .hubkit/yanked.json on the default branch, as one commit.

    Example:
      hubkit yank ana/chat@1.2.0 --reason "trained on the test set"
      hubkit yank ana/chat@1.2.0 --undo
    """
    emit(yank(reference, reason=reason, undo=undo, registry=registry), _render)


def _render(done: Yanked) -> str:
    state = "no longer yanked" if done.reason is None else f"yanked: {done.reason}"
    lines = [f"{done.repo}@{done.version} is {state}"]
    lines += [f"commit  {done.commit}"] if done.commit else ["nothing changed"]
    return "\n".join(lines)
