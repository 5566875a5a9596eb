"""``hubkit serve``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option
from hubkit.documents.arguments import size
from hubkit.registry.directory.keeping import Checked, Collected
from hubkit.verbs.serve import serve


@declare("serve")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--users",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Who may do what: see hubkit users. Without it everybody on this machine may do everything.",
)
@click.option("--tokens", metavar="FILE", type=click.Path(path_type=Path), help="In its place, JSON: token to user.")
@click.option("--read-only", is_flag=True, help="Refuse whatever would change something.")
@click.option("--quota", metavar="SIZE", help="Store no more than this in all, e.g. 50GB.")
@click.option(
    "--audit",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Append a line of JSON for each change and refusal.",
)
@click.option(
    "--grace", default=10.0, show_default=True, metavar="SECONDS", help="Time for running requests at the end."
)
@click.option("--public-url", metavar="URL", help="The address clients use, when a proxy stands in front.")
@click.option("--open-to-network", is_flag=True, help="Allow an open server on an address that others reach.")
@click.option(
    "--gc", is_flag=True, help="Do not serve: remove what was uploaded and no commit names. Safe beside users."
)
@click.option("--check", is_flag=True, help="Do not serve: read every byte and say what is damaged. Safe beside users.")
@json_option
def command(directory: Path, **options: Any) -> None:
    """Serve a directory of repositories over the Hub's protocol.

    DIR holds a registry, or nothing yet.

    hubkit, `hf`, transformers and PEFT work against it: point HUBKIT_REGISTRY or HF_ENDPOINT at its address, which
    is printed once it answers. Ctrl-C stops it when running requests are finished; a second one at once.

    Example:
      hubkit serve ./registry --port 8000
    """

    def ready(address: str) -> None:
        emit({"url": address, "directory": directory}, lambda one: f"serving {one['directory']} at {one['url']}")

    with suppress(KeyboardInterrupt):  # the way to stop it, not a failure
        found = serve(directory, ready=ready, **options)
        if isinstance(found, Collected):
            emit(found, _collected)
        elif found is not None:
            emit(found, _checked)
            click.get_current_context().exit(1 if found.damaged else 0)


def _checked(found: Checked) -> str:
    read = f"{found.repositories} repositories, {found.commits} commits, {found.objects} objects ({size(found.size)})"
    lines = [f"damaged  {line}" for line in found.damaged]
    return "\n".join([*lines, f"{read} read again, {len(lines) or 'nothing'} damaged"])


def _collected(done: Collected) -> str:
    return f"removed {done.objects} objects that no commit names ({size(done.size)}); {done.kept} stay"
