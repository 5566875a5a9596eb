"""``hubkit predict``."""

from __future__ import annotations

from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import device_option, mismatch_option, offline_option
from hubkit.verbs.predict import Predicted, predict


@declare("predict")
@click.argument("adapter")
@click.argument("data", metavar="ROWS|TEXT")
@click.option("--text", "column", metavar="COLUMN", help="Column of the text.  [default: found by its name]")
@click.option("--base", "-b", metavar="DIR|ORG/NAME", help="Default: the one the adapter's manifest names.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows per forward pass.")
@device_option
@click.option("--revision", metavar="REV", help="Of the base.")
@mismatch_option
@offline_option
@registry_option
@json_option
def command(adapter: str, data: str, **options: Any) -> None:
    """Label rows, or one text, with an adapter that has a head.

    ADAPTER was trained with --task classification. ROWS is a file of rows as for train; anything else is one text. A
    line holds the label, its probability and where the row stands; --json holds the probabilities of all labels.

    Example:
      hubkit predict ./cuisine "They serve sushi near the river." --base ./classifier
    """
    with ProgressBar("pull") as work:
        result = predict(adapter, data, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Predicted) -> str:
    return "\n".join(_line(row["label"], row["probabilities"], row["where"]) for row in done.rows)


def _line(label: str, probabilities: dict[str, float], where: str) -> str:
    return f"{label}  {probabilities[label]:.4f}  {where}".rstrip()
