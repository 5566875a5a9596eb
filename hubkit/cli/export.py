"""``hubkit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import offline_option
from hubkit.verbs.export import Exported, export


@declare("export")
@click.argument("reference")
@click.option("--to", default="peft", show_default=True, help="peft (serving engines read it, too) or adapterhub.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--base", "-b", metavar="BASE", help="Folder or repository of the base, where it lies in 4 bits.")
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--replace", is_flag=True, help="Replace what an earlier export left there.")
@offline_option
@registry_option
@json_option
def command(reference: str, out: Path, **given: Any) -> None:
    """Write an adapter in another tool's format.

    REFERENCE is a folder or a repository.

    Example:
      hubkit export ./chat --to peft --out ./chat-peft
    """
    with ProgressBar(f"pull {reference}") as work:
        result = export(reference, out, progress=work.reach, **given)
    emit(result, _render)


def _render(done: Exported) -> str:
    return "\n".join([f"exported {done.path} ({done.to})", *(f"  {name}" for name in done.files)])
