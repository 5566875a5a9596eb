"""``hubkit plan``."""

from __future__ import annotations

from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, table
from hubkit.cli.progress import ProgressBar
from hubkit.cli.settings import settings
from hubkit.cli.terms import offline_option
from hubkit.verbs.plan import MethodPlan, TrainingPlan, plan


@declare("plan")
@click.argument("base")
@click.argument("data", required=False, metavar="[DATA]")
@click.option("--method", metavar="NAME|all", help="One method, or all. Default: hubkit's own and one of each kind.")
@click.option("--set", "config", metavar="NAME=VALUE", multiple=True, help="Option of the method; may be repeated.")
@click.option("--batch-size", type=int, default=4, show_default=True, help="Rows per forward pass, on one process.")
@click.option("--max-length", type=int, help="Tokens per row.  [default: the longest row of DATA, else 512]")
@click.option("--gpus", type=int, help="Processes over which --shard divides the base.")
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "paged_adamw_32bit", "paged_adamw_8bit"]),
    default="adamw",
    show_default=True,
    help="As in training.",
)
@click.option("--checkpointing", is_flag=True, help="Activations are computed again.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="In which the base computes.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda with --gpus, else as found here]")
@click.option("--revision", metavar="REV", help="Of the base.")
@offline_option
@registry_option
@json_option
def command(base: str, data: str | None, config: tuple[str, ...], **options: Any) -> None:
    """Show how much memory training a base takes, method by method.

    BASE may be a folder with a config.json alone: weights are neither needed nor read. With DATA, rows are as long as
    its longest, and ranks as large as training would choose for it.

    Example:
      hubkit plan ./SmolLM2-135M-Instruct rows.jsonl --method all --batch-size 8
    """
    with ProgressBar(f"read {base}") as work:
        result = plan(base, data, config=settings(config), progress=work.reach, **options)
    emit(result, _render)


def _render(done: TrainingPlan) -> str:
    each = (
        f", on each of {done.processes} processes, the base divided among them (--shard)" if done.processes > 1 else ""
    )
    seen = f" (rows with {done.targets:,} target tokens)" if done.targets is not None else ""
    head = ("METHOD", "TRAINED", "WEIGHTS", "TRAINED STATES", "ACTIVATIONS", "HEAD", "REST", "TOTAL")
    lines = [
        f"base    {done.base}: {done.parameters / 1e9:.3g} B parameters, {done.dtype} on {done.device}",
        f"step    {done.rows} rows of {done.tokens} tokens{seen}{each}",
        "",
        table([_row(one) for one in done.methods], head=head),
    ]
    lines += [f"cannot be planned: {name}: {why}" for name, why in done.left_out.items()]
    said = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in done.textbook.items())
    return "\n".join([*lines, "", f"textbook, without activations: {said}"])


def _row(one: MethodPlan) -> tuple[str, ...]:
    part = one.memory
    states = part["parameters"] + part["gradients"] + part["moments"]
    chosen = "".join(f" ({name} {value})" for name, value in one.chosen.items())
    rest = part["process"] + part["gathered"]
    sizes = (part["weights"], states, part["activations"], part["head"], rest, one.total)
    return one.method + chosen, f"{one.parameters:,}", *map(_size, sizes)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:,.0f} MiB"
