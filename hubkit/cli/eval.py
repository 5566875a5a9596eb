"""``hubkit eval``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, note, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.terms import (
    device_option,
    incomplete_option,
    mismatch_option,
    mix_option,
    offline_option,
    terms_argument,
)
from hubkit.verbs.eval import Evaluated, eval


@declare("eval")
@terms_argument
@click.option("--data", type=click.Path(path_type=Path), help="Held-out rows of the task.")
@click.option("--general", type=click.Path(path_type=Path), help="Rows to measure forgetting on.  [default: own]")
@click.option("--tasks", metavar="NAMES|DIR", help="Tasks of lm-evaluation-harness: names, or a folder of YAML files.")
@click.option("--limit", type=int, help="Examples of each task at most.")
@click.option("--base", "-b", metavar="DIR|ORG/NAME", help="Default: the one the first adapter's manifest names.")
@mix_option
@click.option("--text", metavar="COLUMN", help="Column of plain text.")
@click.option("--messages", metavar="COLUMN", help="Column of chat messages.")
@click.option("--prompt", metavar="COLUMN", multiple=True, help="Column of the prompt; several are joined.")
@click.option("--completion", metavar="COLUMN", help="Column of the completion.")
@click.option("--label", metavar="COLUMN", help="Column of labels, of an adapter trained with --task.")
@click.option("--raw", is_flag=True, help="Prompt and completion without the chat template.")
@click.option("--max-length", type=int, help="Tokens per row.  [default: the base's context]")
@click.option("--truncate", is_flag=True, help="Cut longer rows instead of refusing them.")
@click.option("--samples", type=int, default=1000, show_default=True, help="How often rows are drawn for intervals.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--require", metavar="GATES", help='E.g. "heldout.loss<1.3, forgetting<0.05"; status 1 otherwise.')
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
@click.option("--record", "record_in", is_flag=True, help="Write them into the adapter: manifest and model card.")
@click.option("--benchmark", "benchmarks", multiple=True, metavar="ORG/DATASET:TASK=FIGURE", help="For the Hub.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="In which the base computes.")
@device_option
@click.option("--revision", metavar="REV", help="Of the base.")
@mismatch_option
@incomplete_option
@offline_option
@registry_option
@json_option
def command(
    terms: tuple[str, ...],
    text: str | None,
    messages: str | None,
    prompt: tuple[str, ...],
    completion: str | None,
    **options: Any,
) -> None:
    """Measure an adapter beside its base, and what it forgot.

    Loss and perplexity on held-out rows with 95 % intervals (rows drawn again, base and adapter on the same draws), and
    forgetting: how many more nats a token of everyday text cost than before. An adapter that was trained with --task is
    measured by the task's scores.

    Example:
      hubkit eval ./chat --data heldout.jsonl --require "difference<0, forgetting<0.05" --out eval.json
    """
    from hubkit.training.rows.data import Columns

    columns = Columns(text, messages, prompt, completion) if text or messages or prompt or completion else None
    with ProgressBar("pull") as work:
        told = lambda device: note(f"measuring on {device}")  # noqa: E731
        result = eval(terms, columns=columns, report=told, progress=work.reach, **options)
    emit(result, _render)


def _render(done: Evaluated) -> str:
    figures = done.figures
    lines = _task(figures) if "task" in figures else _language(figures)
    lines += [f"override  {name}" for name in done.overrides]
    lines += [f"written  {done.out}"] if done.out else []
    return "\n".join([*lines, *([f"digest   {done.digest}"] if done.digest else [])])


def _task(figures: Mapping[str, Any]) -> list[str]:
    """The scores of a task, each beside that of the base or of the commonest answer."""
    held, rows = figures["heldout"], figures["data"]["rows"]
    other = next((name for name in ("base", "constant") if name in figures), None)
    title = {"base": "base", "constant": "commonest answer"}.get(str(other))
    lines = [f"held-out rows  {rows} rows", f"loss           {held['loss']:.4f}"]
    lines[-1] += f"  {title} {figures['base']['loss']:.4f}" if other == "base" else ""
    for name in (one for one in held if one != "loss" and not one.endswith(("_low", "_high"))):
        line = f"{name.replace('_', ' '):13}  {_with_ends(held, name)}"
        if other is not None and name in figures[other]:
            line += f"  {title} {_with_ends(figures[other], name)}"
        if (more := figures.get("difference", {}).get(name)) is not None:
            line += f"  difference {more['value']:+.4f} ({more['low']:+.4f} to {more['high']:+.4f})"
        lines.append(line)
    return lines


def _with_ends(figures: Mapping[str, float], name: str) -> str:
    sure = f" ({figures[f'{name}_low']:.4f} to {figures[f'{name}_high']:.4f})" if f"{name}_low" in figures else ""
    return f"{figures[name]:.4f}{sure}"


def _language(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    if "heldout" in figures:
        lines.append(f"held-out rows  {figures['data']['rows']} rows, {figures['data']['tokens']} tokens learnt")
        lines += [_loss(title, figures[name]) for title, name in (("base", "base"), ("adapted", "heldout"))]
        lines.append(_line("difference", figures["difference"], "nats a token"))
    lost = figures["forgetting"]
    lines.append(_line("forgetting", lost, f"nats a token on {figures['general']['rows']} general rows"))
    for task, values in figures.get("tasks", {}).items():
        own = {name: value for name, value in values.items() if name != "base" and not name.endswith("_stderr")}
        bare = values.get("base", {})
        lines += [
            f"  {task} {name}: {value:.4g}" + (f" (base {bare[name]:.4g})" if name in bare else "")
            for name, value in own.items()
        ]
    return lines


def _loss(title: str, one: Mapping[str, float]) -> str:
    shown = f"{title:13}  loss {one['loss']:.4f} ({one['loss_low']:.4f} to {one['loss_high']:.4f})"
    if "perplexity_high" in one:
        shown += f"  perplexity {one['perplexity']:.2f} ({one['perplexity_low']:.2f} to {one['perplexity_high']:.2f})"
    return shown


def _line(title: str, one: Mapping[str, float], unit: str) -> str:
    return f"{title:13}  {one['value']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f}) {unit}"
