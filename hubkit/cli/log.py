"""``hubkit log``."""

from __future__ import annotations

from collections.abc import Iterator

import click

from hubkit.cli.diff import value_text
from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.verbs.log import MOST, Logged, log


@declare("log")
@click.argument("reference")
@click.option("--all", "every", is_flag=True, help="Every commit, those without a version, too.")
@click.option("--limit", type=click.IntRange(1), default=MOST, show_default=True, help="Show so many at most.")
@registry_option
@json_option
def command(reference: str, every: bool, limit: int, registry: str | None) -> None:
    """List the versions of an adapter, and what changed from one to the next.

    REFERENCE is org/name, or org/name@revision to begin there. The newest comes first: its version, commit, date and
    message, and below it the files and the fields of the manifest in which it differs from the one before.

    Example:
      hubkit log ana/chat
      hubkit log ana/chat --all --limit 5
    """
    emit(log(reference, every=every, limit=limit, registry=registry), _render)


def _render(found: tuple[Logged, ...]) -> str:
    return "\n".join(line for one in found for line in _lines(one)) or "no versions; --all lists the commits"


def _lines(one: Logged) -> Iterator[str]:
    versions = ", ".join(one.versions) or "-"
    yield "  ".join(filter(None, [versions, one.commit[:12], one.date[:10], one.title]))
    for field in one.fields:
        yield f"    {field.name}: {value_text(field.first)} -> {value_text(field.second)}"
    for sign, names in (
        ("+", [file.name for file in one.files if file.first is None]),
        ("-", [file.name for file in one.files if file.second is None]),
        ("~", [file.name for file in one.files if None not in (file.first, file.second)]),
    ):
        if names:
            yield f"    {sign} {', '.join(names)}"
    if not one.first and not one.fields and not one.files:
        yield "    the same files"
