"""``hubkit advise``."""

from __future__ import annotations

from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import offline_option
from hubkit.verbs.advise import Advised, advise

UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"))
SIZES = ((1e18, "E"), (1e15, "P"), (1e12, "T"))
STATED = 1e14
"""Operations per second by which a machine is spoken of that is not here."""


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

    Whether to train at all, what to train, how much memory and time it takes, and the command that does it, each
    with its reason and source. Weights are neither needed nor read. The time is that of this machine, on which two
    layers of the base's width are trained for a second; none is said for a machine that --memory or --gpus describe.

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
        f"time    {_time(done)}",
        "",
    ]
    for one in done.reasons:
        lines += [f"- {one.advice}: {one.why} ({one.source})"]
    return "\n".join([*lines, "", done.command])


def _time(done: Advised) -> str:
    work = f"{_scaled(done.operations)}FLOP"
    if done.seconds is None or done.speed is None:
        why = "of another machine, or of layers too large to try here"
        return f"not known {why}: {work}, {_span(done.operations / STATED)} at 100 TFLOP/s"
    least, most = done.seconds
    return (
        f"about {_span(least, most)} on this machine: {work} at the {_scaled(done.speed)}FLOP/s measured on its layers"
    )


def _span(least: float, most: float = 0.0) -> str:
    """From so many seconds to so many, in the unit of the longer; one number where the other is 0."""
    longer = most or least
    size, name = next((one for one in UNITS if longer >= 2 * one[0]), (1, "seconds"))
    few = [one / size for one in (least, most)]
    said = [f"{max(1, round(one))}" if one >= 10 or size == 1 else f"{one:.2g}" for one in few]
    return f"{said[0]} to {said[1]} {name}" if most and said[0] != said[1] else f"{said[0]} {name}"


def _scaled(number: float) -> str:
    size, letter = next((one for one in SIZES if number >= one[0]), (1e9, "G"))
    return f"{number / size:.3g} {letter}"


def _shown(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
