"""``hubkit serve``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option
from hubkit.verbs.serve import serve


@declare("serve")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--tokens", metavar="FILE", type=click.Path(path_type=Path), help="JSON: token to user. Without it, open."
)
@click.option("--public-url", metavar="URL", help="The address clients use, when a proxy stands in front.")
@click.option("--open-to-network", is_flag=True, help="Allow an open server on an address that others reach.")
@json_option
def command(
    directory: Path, host: str, port: int, tokens: Path | None, public_url: str | None, open_to_network: bool
) -> None:
    """Serve a directory of repositories over the Hub's protocol.

    hubkit, `hf`, transformers and PEFT work against it: point HUBKIT_REGISTRY or HF_ENDPOINT at its address, which
    is printed once it answers. Ctrl-C stops it when running requests are finished.

    Example:
      hubkit serve ./registry --port 8000
    """

    def ready(address: str) -> None:
        emit({"url": address, "directory": directory}, lambda one: f"serving {one['directory']} at {one['url']}")

    with suppress(KeyboardInterrupt):  # the way to stop it, not a failure
        serve(
            directory,
            host=host,
            port=port,
            tokens=tokens,
            public_url=public_url,
            open_to_network=open_to_network,
            ready=ready,
        )
