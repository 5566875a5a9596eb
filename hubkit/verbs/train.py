"""`train`: from a base and rows to a complete adapter folder, checked and ready to share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from hubkit.artifact.folder import CARD_NAME, check_adapter
from hubkit.documents.arguments import checked
from hubkit.documents.licenses import require_license
from hubkit.documents.schema import canonical
from hubkit.documents.shown import Shown
from hubkit.named.runs.continuing import Start, begin
from hubkit.named.runs.judging import Judge
from hubkit.named.runs.outcome import manifest_of, may_replace, training_of
from hubkit.named.runs.tasking import require_same_task, task_of
from hubkit.named.sources import base_with_record, chosen_name
from hubkit.named.vocabulary import added_tokens, prepared, tokenizer_with
from hubkit.named.writing import card_of, drafted, write_live
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.training.ranks.together import together

if TYPE_CHECKING:
    import torch

    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.methods.host import Method
    from hubkit.methods.reading import Planned
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.training.events import Event, Metrics
    from hubkit.training.options import TrainGiven, TrainOptions
    from hubkit.training.rows.data import Columns, Record
    from hubkit.training.rows.encode import Row
    from hubkit.training.rows.summary import Prepared
    from hubkit.training.tasks.task import Task


@dataclass(frozen=True, repr=False)
class Trained(Shown):
    """A finished training.

    Args:
        path: the adapter's folder.
        digest: its identity.
        method: what was trained.
        parameters: numbers in the adapter.
        metrics: of the run; `seconds` is this process's share.
        untrained: parameters that no method trains where all modules are trained: routers, convolutions, Mamba's state.
        evaluation: figures of the adapter, where some were asked for by `require` or `general`.
        scores: of a task, on the validation rows: accuracy, f1_macro, f1_micro; of words also exact_match and span_f1;
            of written texts perplexity, exact_match, rouge1...; of vectors accuracy_at_1, mrr_at_10, ndcg_at_10.
    """

    path: Path
    digest: str
    method: str
    parameters: int
    metrics: Metrics
    untrained: tuple[str, ...] = ()
    evaluation: Mapping[str, Any] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


@together
@checked
def train(
    base: Path | str,
    data: Path | str,
    out: Path | str,
    *,
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
    name: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    replace: bool = False,
    resume: bool = False,
    parent: Path | str | None = None,
    require: str | None = None,
    general: Path | str | None = None,
    tensorboard: Path | str | None = None,
    allow_incomplete_base: bool = False,
    device: str = "auto",
    report: Callable[[Event], None] = lambda event: None,
    progress: Progress | None = None,
    **options: Unpack[TrainGiven],
) -> Trained:
    """Trains an adapter.

    While it runs, checkpoints lie in ``<out>.run`` beside the result; a killed run goes on with `resume` and gives the
    same bytes as one that was never killed.

    Args:
        base: folder or repository of the base.
        data: rows, ``.jsonl``, ``.json``, ``.csv``, ``.parquet``, ``.txt`` or ``datasets:...``: text, chat messages,
            or prompt and completion; see ``docs/rows.md``.
        out: the adapter's folder.
        method: what to train; hubkit's default method when None.
        config: options of the method, JSON values or text.
        columns: which columns to train on; found from the data when None.
        raw: prompt and completion without the chat template.
        task: ``causal-lm``: the next token; ``seq2seq``: a text for a text; ``classification``: one label a row;
            ``token-classification``: one a word; ``embedding``: vectors of texts; see ``docs/tasks.md``. When None what
            the base is: one of the first two.
        label: the column of labels, or of spans; found by its name when None.
        text_pair: the column of the second text, of rows with two; found by its name when None.
        labels: the label set, in the order of the head's outputs; when None that of the base's head, or of the rows.
        validation_data: rows to validate on, instead of a share of `data`.
        duplicates: what becomes of rows that equal one before them: "keep", "drop", "refuse".
        overlap: what becomes of rows that stand in `validation_data`, too: "refuse", "drop".
        name: the adapter's; the folder's name by default.
        license: SPDX identifier, for manifest and model card.
        revision: of the base, where `base` is a repository that names none.
        replace: replace an adapter that is at `out`.
        resume: go on from the checkpoint, made on this device or another; without one, begin.
        parent: an adapter to go on from, folder or repository: its method and configuration, its values as the start.
        require: gates on the trained adapter, ``"heldout.loss<1.3, forgetting<0.05"``; it is written only if they hold.
            The figures go into its manifest and card.
        general: rows that forgetting is measured on, instead of hubkit's own; given, it is measured without gates, too.
        tensorboard: write the run's curves for TensorBoard into this folder.
        allow_incomplete_base: train on a base whose files lack weights that transformers then makes up, or hold some
            that it leaves out; recorded.
        device: where to train: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        report: called with each event of the run.
        progress: of the base's download.
        options: fields of `hubkit.training.options.TrainOptions`; the method's recipe fills what is not given.

    Raises:
        HubkitError: ``HK-EXISTS``, ``HK-NAME``, ``HK-BASE-*``, ``HK-GATE``, ``HK-EXTRA``, ``HK-DATA``, ``HK-COLUMNS``,
            ``HK-ROW-TOO-LONG``, ``HK-CONFIG``, ``HK-TARGET``, ``HK-HEAD``, ``HK-VOCABULARY``, ``HK-OPTIONS``,
            ``HK-OPTIMIZER``, ``HK-COMPILE``, ``HK-LABELS``, ``HK-CODEC``, ``HK-DEVICE``, ``HK-DTYPE``, ``HK-MEMORY``,
            ``HK-NAN``, ``HK-RESUME`` and what they call for.
    """
    from hubkit.training import checkpoint
    from hubkit.training.advice.fitting import fitted_config, fitted_options
    from hubkit.training.measuring.watching import Board, watching
    from hubkit.training.optimizers import require_optimizer
    from hubkit.training.options import TrainOptions
    from hubkit.training.ranks.world import world
    from hubkit.training.rows.data import read_data
    from hubkit.training.rows.preparing import require_choices
    from hubkit.training.tasks.kinds import require_applicable, task_for
    from hubkit.training.tasks.task import Asked

    said = Asked(columns, label, text_pair, tuple(labels or ()))
    asked = {**options, "raw": raw, "general": general, "incomplete": allow_incomplete_base}
    require_applicable(task, said, asked)
    require_license(license)
    out = Path(out)
    run_dir = out.with_name(out.name + ".run")
    replace = may_replace(out, replace, resume and (run_dir / checkpoint.CHECKPOINT).exists(), resume)
    name = chosen_name(name, out)
    judge = Judge.of(require, general, validation_data, options.get("validation"), task)
    board = Board(Path(tensorboard)) if tensorboard is not None else None
    start = begin(parent, method, config, where := Where(registry, offline, progress))
    chosen = start.method
    wanted = TrainOptions.of(options, chosen.info.recipe)
    world().require_work(wanted.batch_size, wanted.accumulate, wanted.shard)
    require_optimizer(wanted.optimizer, place := world().device(device))
    require_choices(duplicates, overlap)
    records, origin = world().once(lambda: read_data(data, offline))
    held = world().once(lambda: read_data(validation_data, offline)[0]) if validation_data else None
    source, record = world().once(lambda: base_with_record(base, revision, where))
    start.require_base(record)
    require_same_task(task := task_for(task, source.path, said, asked), start)
    wanted = fitted_options(options, chosen, start.settings, source.path)
    settings, vocabulary, tokens = prepared(start.settings, source.path)
    work = task_of(task, records, said, source.path, start) if task else None
    settings, wanted = work.fitted(settings, chosen.name, wanted) if work else (settings, wanted)
    plan, left = _planned(chosen, settings, source.path, record, allow_incomplete_base, work, wanted.shard)
    draft = drafted(name, chosen, settings, record, plan.codec, license, vocabulary, wanted.dtype)
    check_adapter(out, draft, {CARD_NAME: card_of(out, draft, ())}, replace=replace)  # now, not after hours of training
    tokenizer = tokenizer_with(source.path, added_tokens(draft), name)
    given, equal = (records, held, columns), (duplicates, overlap)
    rows, validation = _rows(given, tokenizer, source.path, wanted, raw, plan.front, equal, report, work)
    judge.prepare(work, validation, wanted.batch_size, tokenizer, source.path, plan.front, raw)
    if work is None or work.learns_tokens:  # targets are counted in tokens; of a label nothing says how much it holds
        settings = fitted_config(chosen, settings, start.given, source.path, rows, report)
    start = dataclasses.replace(start, settings=settings)
    how = _How(name, source.path, record, allow_incomplete_base, run_dir, resume, plan.codec, place, work)
    with watching(report, run_dir, board) as told:
        adapter, metrics, scores = _fit(how, start, rows, validation, wanted, told, judge)
    training = training_of(wanted, rows, metrics, origin) | ({"untrained": left} if left else {})
    done = work.document(scores) if work else None
    manifest = manifest_of(draft, adapter, start, judge, training, allow_incomplete_base, done)
    beside = {**tokens, "metrics.json": canonical({**metrics.to_document(), **scores})}
    digest = world().once(lambda: write_live(out, adapter, manifest, record, replace, beside).digest)
    world().once(lambda: checkpoint.discard(run_dir))
    count = sum(p.numel() for p in adapter.parameters().values())
    return Trained(out, digest, chosen.name, count, metrics, tuple(left), judge.figures, scores)


def _planned(
    method: Method, settings: Any, base: Path, record: BaseRecord, incomplete: bool, work: Task | None, shard: bool
) -> tuple[Planned, list[str]]:
    """What will be made, by the base's files, and what nothing trains; see `left_alone`.

    The model that transformers will make of the files must be the same there.

    Raises:
        HubkitError: ``HK-BASE-*``, ``HK-OPTIONS`` with `shard`; what the method's `inject` raises.
    """
    from hubkit.methods.reading import planned
    from hubkit.tensors.base.agreement import left_alone, outline, require_agreement, require_weights
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.files.coded import in_mxfp4
    from hubkit.training.ranks.sharding import require_divisible

    files, model = Base.from_folder(base), outline(base, work.model if work else None)
    files = work.model.sites_of(files) if work else files
    if not incomplete and not any(site.packed for site in files.sites.values()):
        stored = {tensor.name: tensor.shape for tensor in record.tensors}
        # what is packed has other names and shapes
        stored |= in_mxfp4(stored) | {site.tensor: site.shape for site in files.linear() if site.coded}
        stored |= work.model.tensors if work else {}
        require_weights(model, base, stored, files.arch.prefix)
    plan, live = planned(method, settings, files), Base.from_model(model)
    require_divisible(plan.sites if shard else ())
    live.keep(work.model.made if work else ())
    require_agreement(plan.sites, planned(method, settings, live).sites, files, live)
    return plan, left_alone(plan.sites, live)


def _rows(
    given: tuple[list[Record], list[Record] | None, Columns | None],
    tokenizer: Any,
    base: Path,
    options: TrainOptions,
    raw: bool,
    front: int,
    equal: tuple[str, str],
    report: Callable[[Prepared], object],
    work: Task | None,
) -> tuple[list[Row], list[Row]]:
    """Rows to train and to validate on.

    Args:
        given: records to train on, those to validate on, and the columns that are meant.
        equal: what becomes of duplicates and of the overlap.
    """
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.training.rows.preparing import prepared_rows

    records, held, columns = given
    return prepared_rows(
        records,
        held,
        tokenizer,
        columns,
        options,
        context=context_of_folder(base),
        front=front,
        raw=raw,
        duplicates=equal[0],
        overlap=equal[1],
        report=report,
        task=work,
    )


@dataclass(frozen=True)
class _How:
    """What a run is called, on which base, where it leaves its checkpoints, and how its model is made."""

    name: str
    base: Path
    record: BaseRecord
    incomplete: bool
    run_dir: Path
    resume: bool
    codec: str | None
    device: torch.device
    work: Task | None


def _fit(
    how: _How,
    start: Start,
    rows: list[Row],
    validation: list[Row],
    options: TrainOptions,
    report: Callable[[Event], None],
    judge: Judge,
) -> tuple[Adapter, Metrics, Mapping[str, float]]:
    from hubkit.compat.transformers import quiet
    from hubkit.tensors.device import computing
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.training.loop import fit
    from hubkit.training.ranks.loading import attached_base
    from hubkit.training.ranks.sharding import shard
    from hubkit.training.ranks.world import world

    name, device, work = how.name, how.device, how.work
    task, drawn = (work.model, partial(work.fill, seed=options.seed)) if work else (None, None)
    given = how.base, options.dtype, how.codec
    attached, late = attached_base(*given, device, options.shard, incomplete=how.incomplete, task=task, fill=drawn)
    with computing(device, "the adapter", "a lower --set rank, or fewer targets"):
        attached.sites.keep(work.model.made if work else ())
        adapter = Adapter.fresh(name, start.method, start.settings, attached.sites, options.seed)
        start.fill(adapter)
        attached.add(name, adapter)
    attached.set_mix(name)
    if late:
        shard(attached.model, world(), device, adapter)
    with quiet(), attached.compiled_training() if options.compile else contextlib.nullcontext():
        metrics = fit(
            attached,
            adapter.trainables(),
            work.train_step(start.method.train_step) if work else start.method.train_step,
            rows,
            validation,
            options,
            run_dir=how.run_dir,
            report=report,
            identity={**start.identity(how.record), **(work.identity if work else {})},
            resume=how.resume,
            rates=adapter.learning_rates(),
            kept=adapter.kept(),
            scores=work.watched(options.batch_size) if work else None,
        )
    adapter.to_compute_dtype()
    adapter.require_finite(name)
    with quiet():
        judge.judge(attached, device, str(how.run_dir))
    return adapter.without_zeros(), metrics, judge.scores
