"""``hubkit predict``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import device_option, mismatch_option, offline_option
from hubkit.verbs.predict import Predicted, predict

SHOWN = 5
"""Numbers of a vector in a line for people."""


@declare("predict")
@click.argument("adapter")
@click.argument("data", metavar="ROWS|TEXT")
@click.option("--text", "column", metavar="COLUMN", help="Column of text or words.  [default: found by its name]")
@click.option("--text-pair", metavar="COLUMN", help="Column of the second text, where pairs were trained on.")
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write into this file, .jsonl, an object a row.")
@click.option("--replace", is_flag=True, help="Replace the file that is there.")
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

    ADAPTER was trained with --task. ROWS is a file of rows as for train; anything else is one text. A line holds a
    label, its probability and where the row stands, or a span of the text, or the labels of the row's words, or the
    first numbers of a vector; --json and --out hold all that is said.

    Example:
      hubkit predict ./cuisine "They serve sushi near the river." --base ./classifier
    """
    with ProgressBar("pull") as work:
        result = predict(adapter, data, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Predicted) -> str:
    if done.out is not None:
        return f"wrote {done.out}: {done.count} rows"
    return "\n".join(line.rstrip() for row in done.rows for line in _lines(row))


def _lines(row: Mapping[str, Any]) -> list[str]:
    where = row["where"]
    if "spans" in row:
        spans = [f"{s['label']}  {s['probability']:.4f}  {s['start']}-{s['end']}  {s['text']}" for s in row["spans"]]
        return [f"{span}  {where}" for span in spans] or [f"no spans  {where}"]
    if "vector" in row:
        length = math.sqrt(sum(value * value for value in row["vector"]))
        first = " ".join(f"{value:+.4f}" for value in row["vector"][:SHOWN])
        return [f"{len(row['vector'])} numbers, length {length:.4f}: {first} ...  {where}"]
    if "labels" in row:
        return [f"{' '.join(row['labels'])}  {where}"]
    return [f"{row['label']}  {row['probabilities'][row['label']]:.4f}  {where}"]
