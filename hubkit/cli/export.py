"""``hubkit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.settings import settings
from hubkit.cli.terms import offline_option
from hubkit.verbs.export import Exported, export


@declare("export")
@click.argument("reference")
@click.option("--to", default="peft", show_default=True, help="peft, adapterhub; vllm, sglang, mlx, gguf.")
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--base", "-b", metavar="BASE", help="The base: in 4 bits, a mixture of experts, a model that sees.")
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--rank", type=int, help="For an engine: the largest rank that it takes.")
@click.option("--budget", type=float, metavar="PART", help="For an engine: what may be lost where it is not low-rank.")
@click.option("--set", "config", metavar="NAME=VALUE", multiple=True, help="For an engine: a setting of its form.")
@click.option("--replace", is_flag=True, help="Replace what an earlier export left there.")
@offline_option
@registry_option
@json_option
def command(reference: str, out: Path, config: tuple[str, ...], **given: Any) -> None:
    """Write an adapter in another tool's format.

    REFERENCE is a folder or a repository. The form of an engine that serves is a plain LoRA of one rank and scale 1,
    into which whatever the method scales is written; what is not low-rank needs a budget.

    Example:
      hubkit export ./chat --to peft --out ./chat-peft
      hubkit export ./chat --to mlx --out ./chat-mlx --set adapter_dtype=float16
    """
    with ProgressBar(f"pull {reference}") as work:
        result = export(reference, out, settings=settings(config), progress=work.reach, **given)
    emit(result, _render)


def _render(done: Exported) -> str:
    lines = [f"exported {done.path} ({done.to})", *(f"  {name}" for name in done.files)]
    return "\n".join(lines + [f"note: {line}" for line in done.said])
