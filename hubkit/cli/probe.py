"""``hubkit probe``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, table
from hubkit.cli.runtime import runtime_options
from hubkit.verbs.probe import Probed, probe


@declare("probe")
@click.argument("url")
@click.option(
    "--lock", type=click.Path(path_type=Path), default="hubkit.lock", show_default=True, help="What is served."
)
@click.option("--model", metavar="NAME", help="What the server calls the adapter. Default: found by name and digest.")
@runtime_options
@json_option
def command(url: str, **options: Any) -> None:
    """Ask a running server whether it applies what was locked.

    A readiness probe for containers: exit status 0 where every adapter of the lock acts as it did when it was packed,
    1 where one does not, 3 where that could not be found out. It reads the probes that the lock names by their digest,
    from the store, the adapters' folders or a deployment.

    Example:
      hubkit probe http://127.0.0.1:8000 --lock hubkit.lock --dtype bf16
    """
    emit(probe(url, **options), _render)


def _render(done: Probed) -> str:
    rows = [
        (
            "ok",
            one.name,
            f"at scale {one.fit.expected:g}, {one.fit.off:.4f} nats off, {one.fit.bound:g} allowed",
            one.served,
        )
        for one in done.adapters
    ]
    unproven = "" if done.proven else " (unproven)"
    return f"probed  {done.engine} at {done.url}{unproven}\n{table(rows)}\nlock    {done.lock}"
