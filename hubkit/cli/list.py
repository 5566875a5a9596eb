"""``hubkit list``."""

from __future__ import annotations

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, short, size, table
from hubkit.verbs.list import Listed
from hubkit.verbs.list import list as list_verb


@declare("list")
@click.argument("prefix", required=False, default="")
@click.option("--remote", is_flag=True, help="Ask the registry instead of the local store.")
@registry_option
@json_option
def command(prefix: str, remote: bool, registry: str | None) -> None:
    """List what the local store or a registry holds.

    PREFIX narrows it: an organisation, or the beginning of a repository's name. --registry implies --remote.

    Example:
      hubkit list
      hubkit list --remote ana/
    """
    found = list_verb(prefix, remote=remote, registry=registry)
    emit(found, _remote if remote or registry else _stored)


def _stored(found: tuple[Listed, ...]) -> str:
    rows = [
        (one.reference, one.kind or "", size(one.size or 0), short(one.digest), ", ".join(one.versions))
        for one in found
    ]
    return table(rows, head=("REFERENCE", "KIND", "SIZE", "DIGEST", "KNOWN AS")) if rows else "the store is empty"


def _remote(found: tuple[Listed, ...]) -> str:
    rows = [(one.reference, ", ".join(one.versions)) for one in found]
    return table(rows, head=("REPOSITORY", "VERSIONS")) if rows else "no repositories"
