"""``hubkit copy``."""

from __future__ import annotations

from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, short, table
from hubkit.cli.progress import ProgressBar
from hubkit.verbs.copy import Copied, CopiedVersion, copy


@declare("copy")
@click.argument("reference", metavar="FROM")
@click.argument("to")
@click.option("--as", "name", metavar="ORG/NAME", help="What it is called there. Default: as in FROM.")
@click.option("--all-versions", is_flag=True, help="Every version, lowest first, and which of them are yanked.")
@click.option("--private", is_flag=True, help="If the repository is made now, make it private.")
@registry_option
@json_option
def command(reference: str, to: str, **options: Any) -> None:
    """Copy an adapter or a base from one registry to another, to the byte.

    FROM is a reference, TO a registry (a directory, a URL, 'hf') or a repository: org/name in the default registry,
    hf://org/name, https://host/org/name. Digests and versions stay; a version that is there with other content is
    refused. It comes through the store: what arrived before is not fetched again, what TO has is not sent again.
    --registry is that of FROM.

    Example:
      hubkit copy hf://HuggingFaceTB/SmolLM2-135M-Instruct ./registry
      hubkit copy hf://ana/chat https://hub.acme.example --all-versions
      hubkit copy ana/chat@1.2.0 hf --as acme/chat
    """
    with ProgressBar(f"copy {reference}") as work:
        result = copy(reference, to, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Copied) -> str:
    made = f"a new repository on {done.registry}" if done.created else done.registry
    rows = [(one.version or "-", short(one.commit), short(one.digest), _sent(one)) for one in done.versions]
    lines = [f"copied  {done.source} to {done.repo} on {made}"]
    lines.append(table(rows, head=("VERSION", "COMMIT", "DIGEST", "SENT")))
    return "\n".join(
        lines + [f"  not copied, because it belongs to no adapter or base: {path}" for path in done.left_out]
    )


def _sent(one: CopiedVersion) -> str:
    return "already there" if one.present or not one.uploaded else f"{len(one.uploaded)} files"
