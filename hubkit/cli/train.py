"""``hubkit train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, note, registry_option
from hubkit.cli.progress import ProgressBar
from hubkit.cli.settings import settings
from hubkit.cli.terms import device_option, incomplete_option, offline_option
from hubkit.cli.training import Drawing
from hubkit.training.ranks.launched import speaks
from hubkit.training.tasks.names import TASKS
from hubkit.verbs.preview import Preview, preview
from hubkit.verbs.train import Trained, train

WRITING = frozenset(
    (
        *("name", "license", "resume", "replace", "device", "allow_incomplete_base"),
        *("require", "general", "tensorboard"),
    )
)
"""Options that say nothing of rows."""
DUPLICATES = "Rows that equal one before them.  [default: keep]"
OVERLAP = "Rows that stand in the validation data, too.  [default: refuse]"
DRY_RUN = (
    "Show N rows as the model sees them (3), and figures of all; train nothing, write nothing. No --out is needed."
)


@declare("train")
@click.argument("base")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="The adapter's folder.")
@click.option("--method", metavar="NAME", help="What to train; `hubkit methods` lists them. Default: hubkit's own.")
@click.option("--set", "config", metavar="NAME=VALUE", multiple=True, help="Option of the method; may be repeated.")
@click.option("--text", metavar="COLUMN", help="Column of plain text: every token is learnt.")
@click.option("--messages", metavar="COLUMN", help="Column of chat messages: assistant turns are learnt.")
@click.option("--prompt", metavar="COLUMN", multiple=True, help="Column of the prompt; several are joined.")
@click.option("--completion", metavar="COLUMN", help="Column of the completion: only it is learnt.")
@click.option("--system", metavar="COLUMN", help="Column of the system message.")
@click.option("--tools", metavar="COLUMN", help="Column of the tools that the chat template is given.")
@click.option("--history", metavar="COLUMN", help="Column of earlier pairs of prompt and completion.")
@click.option("--duplicates", type=click.Choice(["keep", "drop", "refuse"]), default="keep", help=DUPLICATES)
@click.option("--overlap", type=click.Choice(["refuse", "drop"]), default="refuse", help=OVERLAP)
@click.option("--dry-run", metavar="[N]", is_flag=False, flag_value=3, type=click.IntRange(min=0), help=DRY_RUN)
@click.option("--task", type=click.Choice(TASKS), help="What is learnt instead of the next token: docs/tasks.md.")
@click.option("--label", metavar="COLUMN", help="Column of labels, or of spans, with --task.")
@click.option("--text-pair", metavar="COLUMN", help="Column of the second text of a pair, with --task.")
@click.option("--labels", metavar="A,B,C", help="The labels in the order of the head's outputs, with --task.")
@click.option("--raw", is_flag=True, help="Prompt and completion without the chat template.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--epochs", type=float, help="Passes over the rows, instead of --steps.  [default: 1]")
@click.option("--batch-size", type=int, help="Rows per forward pass.  [default: 4]")
@click.option("--accumulate", type=int, help="Forward passes per step.  [default: 1]")
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "paged_adamw_32bit", "paged_adamw_8bit"]),
    help="Paged: bitsandbytes', on a CUDA device.  [default: adamw]",
)
@click.option("--learning-rate", "--lr", type=float, help="Highest learning rate.  [default: the method's recipe]")
@click.option("--warmup", type=float, help="Share of steps over which the rate rises.  [default: 0.03]")
@click.option("--schedule", type=click.Choice(["cosine", "linear", "constant"]), help="[default: cosine]")
@click.option("--weight-decay", type=float, help="[default: the method's recipe]")
@click.option("--clip", type=float, help="Largest norm of the gradient; 0: none.  [default: 1]")
@click.option("--max-length", type=int, help="Tokens per row.  [default: the base's context]")
@click.option("--truncate", is_flag=True, default=None, help="Cut longer rows instead of refusing them.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="In which the base computes.")
@device_option
@click.option("--checkpointing", is_flag=True, default=None, help="Less memory, about a third more time.")
@click.option("--packing", is_flag=True, default=None, help="Rows of a forward pass behind each other, not padded.")
@click.option("--compile", is_flag=True, default=None, help="Faster steps after a slow first one: torch.compile.")
@click.option("--shard", is_flag=True, default=None, help="Divide the base among the processes of torchrun: FSDP2.")
@click.option("--validation", type=float, help="Share of the rows held out.  [default: 0]")
@click.option("--validation-data", type=click.Path(path_type=Path), help="Rows to validate on, instead of a share.")
@click.option("--patience", type=int, help="Stop after so many evaluations without improvement.")
@click.option("--eval-every", type=int, help="Steps between evaluations.  [default: once per epoch]")
@click.option("--save-every", type=int, help="Steps between checkpoints.  [default: 100]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--chunked-loss/--stock-loss", default=None, help="hubkit's own loss where the model allows it, or not.")
@click.option("--short-attention/--stock-attention", default=None, help="On a CPU: faster attention for short rows.")
@click.option("--name", help="The adapter's name.  [default: the folder's]")
@click.option("--license", metavar="SPDX", help="Licence, e.g. apache-2.0.")
@click.option("--revision", metavar="REV", help="Of the base.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint of a killed run.")
@click.option("--replace", is_flag=True, help="Replace the adapter that is there.")
@click.option("--from", "parent", metavar="DIR|ORG/NAME", help="Go on from this adapter: its method, its values.")
@click.option("--require", metavar="GATES", help='Keep it only if, e.g. "heldout.loss<1.3, forgetting<0.05".')
@click.option("--general", type=click.Path(path_type=Path), help="Rows to measure forgetting on, and do.")
@click.option("--tensorboard", metavar="DIR", type=click.Path(path_type=Path), help="Curves for TensorBoard.")
@incomplete_option
@offline_option
@registry_option
@json_option
def command(
    base: str,
    data: Path,
    out: Path | None,
    config: tuple[str, ...],
    text: str | None,
    messages: str | None,
    prompt: tuple[str, ...],
    completion: str | None,
    system: str | None,
    tools: str | None,
    history: str | None,
    labels: str | None,
    dry_run: int | None,
    **options: Any,
) -> None:
    """Train an adapter on a base and your rows.

    BASE is a folder or a repository. DATA is .jsonl, .json, .csv, .tsv, .parquet or .txt, also with .gz, a folder of
    save_to_disk, or datasets:ORG/NAME[:CONFIG][@REVISION][#SPLIT]; with text, chat messages, or prompt and completion.
    The columns are found by their names and shown. Loss is taken on completions only. The result is a complete
    adapter folder, bound to the exact base. Killed half-way, run it again with --resume: same bytes.

    Example:
      hubkit train ./SmolLM2-135M-Instruct rows.jsonl --out ./chat --set rank=8 --epochs 2 --validation 0.1
    """
    from hubkit.training.rows.data import Columns

    chosen = Columns(text, messages, prompt, completion, system, tools, history)
    columns = chosen if chosen.names() else None
    options["labels"] = None if labels is None else [one.strip() for one in labels.split(",")]
    if dry_run is not None:
        if not speaks():  # of several processes one shows
            return
        given = {name: value for name, value in options.items() if name not in WRITING}
        with ProgressBar(f"pull {base}") as work:
            shown = preview(
                base, data, rows=dry_run, config=settings(config), columns=columns, progress=work.reach, **given
            )
        emit(shown, _render_preview)
        return
    if out is None:
        raise click.UsageError("Missing option '--out' / '-o'.")
    with ProgressBar(f"pull {base}") as work, Drawing() as drawing:
        result = train(
            base,
            data,
            out,
            config=settings(config),
            columns=columns,
            report=drawing,
            progress=work.reach,
            **options,
        )
    if not speaks():
        return
    if result.metrics.early:
        note(f"stopped early: step {result.metrics.kept_step} was the best")
    emit(result, _render)


def _render_preview(shown: Preview) -> str:
    lines = [*shown.figures.lines()]
    if any(piece.learnt for row in shown.rows for piece in row.pieces):
        lines += ["", "[[what is learnt]]"]
    for row in shown.rows:
        cut = f", {row.cut} more cut off" if row.cut else ""
        marks = any(piece.learnt for piece in row.pieces)
        learnt = f", {row.targets} of them learnt" if marks or not row.answer else ""
        lines += ["", f"{row.where}: {row.tokens} tokens{learnt}{cut}", row.text()]
        lines += [f"-> {row.answer}"] if row.answer else []
    return "\n".join(lines)


def _score(done: Trained, name: str, value: float) -> str:
    """A score with its interval, what it was before the first step, and that of the commonest answer."""
    figures, before = done.evaluation or {}, (done.metrics.untrained_scores or {}).get(name)
    held, constant = figures.get("heldout", {}), figures.get("constant", {})
    beside = [f"{before:.4f} before"] if before is not None else []
    beside += [f"{constant[name]:.4f} for the commonest answer"] if name in constant else []
    sure = f" ({held[f'{name}_low']:.4f} to {held[f'{name}_high']:.4f})" if f"{name}_low" in held else ""
    return f"held-out {name.replace('_', ' ')} {value:.4f}{sure}" + (f", {', '.join(beside)}" if beside else "")


def _render(done: Trained) -> str:
    metrics = done.metrics
    lines = [
        f"trained {done.path} ({done.method}, {done.parameters:,} parameters, {metrics.steps} steps,"
        f" {metrics.seconds:.0f} s)",
        f"loss    {metrics.loss:.4f} on the last steps",
    ]
    if metrics.validation_loss is not None:
        before = f" ({metrics.untrained_loss:.4f} before)" if metrics.untrained_loss is not None else ""
        lines.append(f"held-out loss {metrics.validation_loss:.4f}{before}")
    for name in ("difference", "forgetting"):
        if "value" in (one := (done.evaluation or {}).get(name, {})):
            lines.append(f"{name} {one['value']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f}) nats a token")
    lines += [_score(done, name, value) for name, value in done.scores.items()]
    lines += [f"stays as it is: {line}" for line in done.untrained]
    return "\n".join([*lines, f"digest  {done.digest}", f"next: hubkit push {done.path} ORG/NAME"])
