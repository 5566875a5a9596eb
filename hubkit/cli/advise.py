"""``hubkit advise``."""

from __future__ import annotations

from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import offline_option
from hubkit.verbs.advise import Advised, advise


@declare("advise")
@click.argument("base")
@click.argument("data", metavar="DATA")
@click.option("--memory", metavar="SIZE", help="Of one GPU: 24GB.  [default: what this machine has]")
@click.option("--gpus", type=click.IntRange(min=1), help="How many GPUs there are.")
@click.option("--revision", metavar="REV", help="Of the base.")
@offline_option
@registry_option
@json_option
def command(base: str, data: str, **options: Any) -> None:
    """Say which method and options fit a base and your rows, and why.

    Whether to train at all, what to train, how much memory it takes, and the command that does it, each with
    its reason and source. Weights are neither needed nor read.

    Example:
      hubkit advise ./SmolLM2-135M-Instruct rows.jsonl --memory 24GB
    """
    with ProgressBar(f"read {base}") as work:
        result = advise(base, data, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Advised) -> str:
    options = ", ".join(f"{name} {_shown(value)}" for name, value in done.options.items())
    lines = [
        f"rows    {done.rows:,} with {done.targets:,} target tokens, the longest of {done.longest} tokens",
        f"first   {'fine-tune' if done.fine_tune else 'a prompt with examples'}",
        f"method  {done.method}: {options}",
        f"takes   {done.memory / 1e9:.3g} of {done.limit / 1e9:.3g} GB",
        "",
    ]
    for one in done.reasons:
        lines += [f"- {one.advice}: {one.why} ({one.source})"]
    return "\n".join([*lines, "", done.command])


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
