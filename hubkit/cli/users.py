"""``hubkit users``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, note, table
from hubkit.documents.arguments import size
from hubkit.verbs.users import Roster, users


@declare("users")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--add", metavar="NAME", help="A new user; the token is printed this once.")
@click.option(
    "--right",
    "rights",
    metavar="WHERE:LEVEL",
    multiple=True,
    help="Of the new user, repeatable: acme:write, 'acme/exp-*:read', '*:read'. Default: NAME:admin.",
)
@click.option("--renew", metavar="NAME", help="A new token for a user; the old ones are no longer good.")
@click.option("--remove", metavar="NAME", help="Take a user out.")
@json_option
def command(file: Path, **options: Any) -> None:
    """Say who may use a served registry, and make their tokens.

    FILE is what `hubkit serve --users FILE` reads, again whenever it changes. It is TOML that may be edited by hand,
    and holds digests of tokens only. Levels: read sees private repositories, write also makes and changes some, admin
    also deletes, moves, hides and shows them.

    Example:
      hubkit users users.toml --add ana --right acme:write --right "*:read"
    """
    found = users(file, **options)
    emit(found, _render)
    if found.token is not None:
        note("this token is shown once: it goes into HUBKIT_TOKEN for hubkit, into HF_TOKEN for hf")


def _render(found: Roster) -> str:
    if found.token is not None:
        return found.token
    rows = [(one.name, " ".join(one.rights), "disabled" if not one.tokens else "") for one in found.users]
    rows += [(name, "", f"at most {size(most)}") for name, most in sorted(found.quotas.items())]
    return "\n".join([table(rows), "without a token: " + ("what is public" if found.anonymous else "nothing")])
