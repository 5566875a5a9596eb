"""An adapter of a task on rows with labels: its own figures instead of those of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.gates import Gate, require_known
from hubkit.errors import USAGE, HubkitError
from hubkit.named.terms import Term, adapters, attached, codec_of_terms

if TYPE_CHECKING:
    import torch

    from hubkit.tensors.live.attached import Attached
    from hubkit.training.rows.data import Columns
    from hubkit.training.tasks.task import Task

FOREIGN = {"general": "--general", "tasks": "--tasks", "raw": "--raw", "incomplete": "--allow-incomplete-base"}
"""Arguments of an evaluation that say something of language models."""


@dataclass(frozen=True)
class Labelled:
    """Rows with labels, and how they are measured.

    Args:
        data: their file.
        columns, label: which columns are meant.
        longest: tokens of a row at most; None: the base's context.
        truncate: cut longer rows instead of refusing them.
        samples, seed: of the draws for the intervals.
    """

    data: Path
    columns: Columns | None
    label: str | None
    longest: int | None
    truncate: bool
    samples: int
    seed: int


def task_of_terms(terms: Sequence[Term], given: Mapping[str, Any], data: Path | str | None) -> str | None:
    """The task that is measured, by its kind; None: language modelling.

    Args:
        given: arguments by the names of `FOREIGN`.
        data: held-out rows.

    Raises:
        HubkitError: ``HK-OPTIONS`` for what does not go with a task: several adapters, no rows, those arguments.
    """
    from hubkit.training.tasks.kinds import KINDS

    kinds = [str((term.folder.manifest.task or {}).get("kind")) for term in adapters(terms)]
    kind = next((one for one in kinds if one in KINDS), None)
    if kind is None:
        return None
    have = [option for name, option in FOREIGN.items() if given.get(name)]
    have += [f"{len(kinds)} adapters"] if len(kinds) > 1 else []
    have += ["no --data"] if data is None else []
    if have:
        what, want = f"an adapter of the task {kind} is measured alone, on rows with labels", "one adapter, --data ROWS"
        raise HubkitError("HK-OPTIONS", what, want=want, have=have, fix="leave the rest out", status=USAGE)
    return kind


def task_figures(
    term: Term,
    base: Path,
    tokenizer: Any,
    rows: Labelled,
    gates: Sequence[Gate],
    place: torch.device,
    dtype: str | None,
) -> dict[str, Any]:
    """The figures of the adapter's task, see `hubkit.training.measuring.scoring`.

    Args:
        base: its folder, proven to be the adapter's.

    Raises:
        HubkitError: ``HK-GATE`` for a gate on another figure, before the base is loaded; ``HK-HEAD``; ``HK-COLUMNS``,
            ``HK-LABELS``, ``HK-DATA``, ``HK-ROW-TOO-LONG``; ``HK-OPTIONS`` for a task without figures of given rows.
    """
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.tensors.device import computing
    from hubkit.training.measuring.scoring import Draws, figures_of, names_of
    from hubkit.training.rows.data import read_rows
    from hubkit.training.tasks.kinds import KINDS
    from hubkit.training.tasks.task import Asked

    document = term.folder.manifest.task or {}
    records = read_rows(rows.data)
    task = KINDS[document["kind"]].known(document, base).on(records, Asked(rows.columns, rows.label))
    context = context_of_folder(base)
    longest = min(filter(None, (rows.longest, context)), default=1 << 30)
    encoded = task.encode(records, tokenizer, longest, rows.truncate)
    require_known(gates, names_of(task, encoded))
    live, draws = live_task(term, task, base, dtype, place), Draws(rows.samples, rows.seed)
    with computing(place, "the evaluation", "shorter rows: --max-length with --truncate"):
        figures = figures_of(task, live, encoded, 8, draws, rows.data.name)
    return {**figures, "dtype": str(next(live.parameters()).dtype).removeprefix("torch.")}


def live_task(term: Term, task: Task, base: Path, dtype: str | None, place: torch.device) -> Attached:
    """The model of an adapter's task, with the adapter attached: what was made is the adapter's."""
    from hubkit.tensors.live.loading import load_base

    bare = load_base(base, dtype, codec_of_terms([term]), place, task=task.model)
    task.clear(bare)
    return attached(bare, [term], "sum")
