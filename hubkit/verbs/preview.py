"""`preview`: what a training would learn from: rows as the model sees them, and figures of all; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.named.outline import outline
from hubkit.named.runs.continuing import begin
from hubkit.named.runs.tasking import require_same_task, task_of
from hubkit.named.sources import Source, base_reference, base_source
from hubkit.named.vocabulary import prepared, tokenizer_with
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.methods.host import Method
    from hubkit.training.options import TrainGiven
    from hubkit.training.rows.data import Columns
    from hubkit.training.rows.marked import MarkedRow
    from hubkit.training.rows.summary import Prepared
    from hubkit.training.tasks.task import Task


@dataclass(frozen=True, repr=False)
class Preview(Shown):
    """What a training would learn from.

    Args:
        figures: of all rows.
        rows: the first training rows, what is learnt of them marked.
    """

    figures: Prepared
    rows: tuple[MarkedRow, ...]


@checked
def preview(
    base: Path | str,
    data: Path | str,
    *,
    rows: int = 3,
    method: str | None = None,
    config: Mapping[str, Any] | None = None,
    columns: Columns | None = None,
    raw: bool = False,
    task: str | None = None,
    label: str | None = None,
    text_pair: str | None = None,
    labels: Sequence[str] | None = None,
    validation_data: Path | str | None = None,
    duplicates: str = "keep",
    overlap: str = "refuse",
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    parent: Path | str | None = None,
    progress: Progress | None = None,
    **options: Unpack[TrainGiven],
) -> Preview:
    """Reads rows as `train` would, with the same arguments, and shows them. Nothing is trained or written.

    Of the base its tokenizer and configuration are needed, and the headers of its weights where they are there.

    Args:
        base: folder or repository of the base.
        data: rows, as `train` takes them.
        rows: how many of the training rows to show.
        method, config: what would be trained: it may add tokens, or take room for virtual ones.
        columns: which columns to train on; found from the data when None.
        raw: prompt and completion without the chat template.
        task, label, text_pair, labels: another task than language modelling, as `train` takes it: its rows with what is
            learnt of them.
        validation_data: rows to validate on, instead of a share of `data`.
        duplicates, overlap: as in `train`.
        revision: of the base, where `base` is a repository that names none.
        parent: an adapter to go on from: its method and configuration count.
        progress: of the base's download.
        options: fields of `hubkit.training.options.TrainOptions`.

    Raises:
        HubkitError: what `train` raises of its arguments, its rows, and the base's tokenizer.
    """
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.training.options import TrainOptions
    from hubkit.training.rows.data import read_data
    from hubkit.training.rows.marked import marked
    from hubkit.training.rows.preparing import prepared_rows
    from hubkit.training.tasks.kinds import require_applicable, task_for
    from hubkit.training.tasks.task import Asked

    said = Asked(columns, label, text_pair, tuple(labels or ()))
    require_applicable(task, said, asked := {**options, "raw": raw})
    start = begin(parent, method, config, where := Where(registry, offline, progress))
    chosen, settings = start.method, start.settings
    wanted = TrainOptions.of(options, chosen.info.recipe)
    records = read_data(data, offline)[0]
    held = read_data(validation_data, offline)[0] if validation_data else None
    source = _base(base, revision, where)
    require_same_task(task := task_for(task, source.path, said, asked), start)
    settings, vocabulary, _ = prepared(settings, source.path)
    work = task_of(task, records, said, source.path, start) if task else None
    settings, wanted = work.fitted(settings, chosen.name, wanted) if work else (settings, wanted)
    tokenizer = tokenizer_with(source.path, (vocabulary or {}).get("tokens", {}), "the adapter")
    figures: list[Prepared] = []
    found, _ = prepared_rows(
        records,
        held,
        tokenizer,
        columns,
        wanted,
        context=context_of_folder(source.path),
        front=_front(chosen, settings, source.path, work),
        raw=raw,
        duplicates=duplicates,
        overlap=overlap,
        report=figures.append,
        task=work,
    )
    show = work.marked if work else marked
    return Preview(figures[0], tuple(show(row, tokenizer) for row in found[: max(0, rows)]))


def _base(base: Path | str, revision: str | None, where: Where) -> Source:
    """The base's folder; of a repository that is not here yet, one without the values of its weights."""
    reference = base_reference(base, revision)
    made = None if reference.path is not None or where.offline else outline(reference, where)
    return base_source(base, revision, where) if made is None else Source(made.path, str(reference), outline=made)


def _front(method: Method, settings: Any, base: Path, work: Task | None) -> int:
    """Virtual tokens that would stand in front of each row; none where the base's weights are not there to say."""
    from hubkit.methods.reading import planned
    from hubkit.tensors.base.base import Base

    there = any(base.glob("*.safetensors"))
    if not there:
        return 0
    files = Base.from_folder(base)
    return planned(method, settings, work.model.sites_of(files) if work else files).front
