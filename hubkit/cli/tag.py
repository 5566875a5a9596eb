"""``hubkit tag``."""

from __future__ import annotations

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.verbs.tag import Tagged, tag


@declare("tag")
@click.argument("reference", metavar="ORG/NAME[@REV]")
@click.argument("version")
@registry_option
@json_option
def command(reference: str, version: str, registry: str | None) -> None:
    """Give a commit that is published a version.

    REV is a branch, a tag or a commit, by default the newest. VERSION becomes the tag v<VERSION>; it is that of the
    adapter, where one is there, and free for a base. The same again changes nothing; a version never moves.

    Example:
      hubkit tag HuggingFaceTB/SmolLM2-135M-Instruct 1.0.0
    """
    emit(tag(reference, version, registry=registry), _render)


def _render(done: Tagged) -> str:
    what = "tagged" if done.created else "already"
    return f"{what}  {done.repo}@v{done.version}\ncommit  {done.commit}"
