"""``hubkit generate``."""

from __future__ import annotations

from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, note, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import device_option, incomplete_option, mismatch_option, mix_option, offline_option
from hubkit.verbs.generate import Generated, generate


@declare("generate")
@click.argument("prompt")
@click.option("--base", "-b", metavar="DIR|ORG/NAME", help="Default: the one the first adapter's manifest names.")
@click.option("--adapter", "-a", "terms", multiple=True, metavar="[WEIGHT*]ADAPTER", help="May be repeated.")
@mix_option
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: greedy.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling.")
@click.option("--raw", is_flag=True, help="The prompt as it is, without the chat template.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="In which the base computes.")
@device_option
@click.option("--revision", metavar="REV", help="Of the base.")
@mismatch_option
@incomplete_option
@offline_option
@registry_option
@json_option
def command(prompt: str, **options: Any) -> None:
    """Answer a prompt with a base and its adapters.

    Example:
      hubkit generate "What is the capital of France?" --base ./SmolLM2-135M-Instruct --adapter ./chat
    """
    with ProgressBar("pull") as work:
        result = generate(prompt, report=lambda device: note(f"answering on {device}"), progress=work.reach, **options)
    emit(result, _render)


def _render(done: Generated) -> str:
    return done.text
