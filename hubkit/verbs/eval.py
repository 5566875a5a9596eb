"""`eval`: what adapters do on held-out rows beside their base, how sure that is, and what was forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.gates import parse_gates, require_measured, require_passed
from hubkit.artifact.results import parse_benchmarks
from hubkit.documents.arguments import checked
from hubkit.documents.files import write
from hubkit.documents.schema import canonical
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.runs.evaluating import Labelled, task_figures, task_of_terms
from hubkit.named.runs.recording import SCHEMA, record, require_recordable
from hubkit.named.sources import base_with_record, named_base, naming_digest
from hubkit.named.terms import Term, Terms, attached, codec_of_terms, open_terms, require_base, require_mix
from hubkit.named.vocabulary import one_vocabulary, tokenizer_with
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.registry.reference import parse_reference

if TYPE_CHECKING:
    from hubkit.training.rows.data import Columns
    from hubkit.training.rows.encode import Row


@dataclass(frozen=True, repr=False)
class Evaluated(Shown):
    """The figures of one evaluation.

    Args:
        adapters: (reference, digest of its manifest, weight) of each, in order.
        base: what they were held against.
        figures: ``heldout`` and ``base`` (loss in nats a token, perplexity, each with the ends of its 95 % interval),
            ``difference`` (adapted minus base, paired), ``forgetting`` (nats a token on general rows, after minus
            before), ``tasks``; rows by digest. Of a task: its scores in ``heldout``, beside ``base`` (a head of its
            files) or ``constant`` (the commonest answer), and their ``difference``.
        device: where it was computed.
        overrides: named overrides used.
        out: the file that was written.
        digest: the adapter's new identity, where the figures were recorded in it.
    """

    adapters: tuple[tuple[str, str, float], ...]
    base: str
    figures: Mapping[str, Any]
    device: str
    overrides: tuple[str, ...] = ()
    out: Path | None = None
    digest: str | None = None


@checked
def eval(
    terms: Terms,
    *,
    data: Path | str | None = None,
    base: Path | str | None = None,
    general: Path | str | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    mix: str = "sum",
    columns: Columns | None = None,
    label: str | None = None,
    raw: bool = False,
    max_length: int | None = None,
    truncate: bool = False,
    samples: int = 1000,
    seed: int = 0,
    require: str | None = None,
    out: Path | str | None = None,
    record_in: bool = False,
    benchmarks: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    allow_incomplete_base: bool = False,
    report: Callable[[str], None] = lambda device: None,
    progress: Progress | None = None,
) -> Evaluated:
    """Evaluates adapters beside their base; one load of the base, which both take turns in.

    Args:
        terms: adapters: ``"1.0*./a + -0.5*org/b"``, or a mapping reference -> weight.
        data: held-out rows of the task, as for training; None: only what was forgotten, and tasks.
        base: folder or repository; by default the one that the first adapter's manifest names.
        general: rows that the adapter was not made for; a small set of everyday English by default.
        tasks: names of tasks of lm-evaluation-harness, with commas, or a folder of its YAML files.
        limit: examples of each task at most.
        mix: ``sum`` or ``stack``.
        columns: of `data`; found from the rows when None.
        label: the column of labels, of an adapter that was trained with a task; found by its name when None.
        raw: prompt and completion without the chat template.
        max_length: tokens of a row at most; the base's context by default.
        truncate: cut longer rows instead of refusing them.
        samples: how often rows are drawn again for the intervals.
        seed: of the draws: same bytes again.
        require: gates: ``"heldout.loss<1.3, forgetting<0.05"``. The figures are written all the same.
        out: write the figures here, as JSON.
        record_in: write them into the adapter's manifest and card: it gets a new digest, its tensors stay.
        benchmarks: with `record_in`: ``ORG/DATASET:TASK=FIGURE``, written to ``.eval_results`` for the Hub.
        dtype: in which the base computes; its own by default.
        device: where: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        allow_base_mismatch: go on although an adapter was trained on another base.
        allow_incomplete_base: go on with a base whose files are not the model's weights, each once.
        report: called with the device in words, before anything is loaded.

    Raises:
        HubkitError: ``HK-GATE`` for gates that cannot be read, and for figures that do not pass; ``HK-BASE-NEEDED``,
            ``HK-BASE-MISMATCH``, ``HK-MIX``, ``HK-OPTIONS``, ``HK-EXTRA``, ``HK-DATA``, ``HK-COLUMNS``,
            ``HK-ROW-TOO-LONG``, ``HK-TEMPLATE``, ``HK-NO-TARGETS``, ``HK-DEVICE``, ``HK-MEMORY``, ``HK-NAN``; what
            pulling, opening and reading raise.
    """
    from hubkit.compat.transformers import quiet
    from hubkit.tensors.base.agreement import INCOMPLETE
    from hubkit.tensors.base.tokenizer import require_decoder
    from hubkit.tensors.device import described, device_named
    from hubkit.tensors.live.loading import load_base
    from hubkit.training.measuring.figures import Asked, measured, require_samples
    from hubkit.training.measuring.harness import run_tasks, tasks_named

    gates, entries = parse_gates(require), parse_benchmarks(benchmarks)
    require_samples(samples, seed)
    require_mix(mix)
    if entries and not record_in:
        what, fix = "results for the Hub are kept in the adapter", "--record"
        raise HubkitError("HK-OPTIONS", what, want=fix, fix=fix, status=USAGE)
    asked_tasks = tasks_named(tasks, limit)
    place, where = device_named(device), Where(registry, offline, progress)
    members = open_terms(terms, where)
    foreign = {"general": general, "tasks": tasks, "raw": raw, "incomplete": allow_incomplete_base}
    task = task_of_terms(members, foreign, data)
    if task is None:
        require_measured(gates, heldout=data is not None, tasks=tasks is not None, fix="--data ROWS")
    if record_in:
        _require_one(members)
    named, revision = named_base(base, revision, members[0].folder.manifest.base)
    with naming_digest(members[0].folder.manifest.base):
        source, origin = base_with_record(named, revision, where)
    overrides = require_base(members, origin, allow_base_mismatch)
    if task is None:
        require_decoder(source.path, "eval without a task", "an adapter that hubkit trained says its task")
    overrides += (INCOMPLETE,) if allow_incomplete_base else ()
    tokenizer = tokenizer_with(source.path, one_vocabulary(members), " + ".join(one.name for one in members))
    report(described(place))
    codec = codec_of_terms(members)
    rows = {"columns": columns, "raw": raw, "max_length": max_length, "truncate": truncate}
    with quiet():
        if task is None:
            model = load_base(source.path, dtype, codec, place, allow_incomplete_base=allow_incomplete_base)
            live = attached(model, members, mix)
            held, usual, names = _rows(live, source.path, tokenizer, data, general, rows)
            figures = measured(live, Asked(held, usual, names, samples, seed), place)
            if asked_tasks is not None:
                figures["tasks"] = run_tasks(live, tokenizer, asked_tasks, seed)
            figures["dtype"] = str(next(live.parameters()).dtype).removeprefix("torch.")
        else:
            labelled = Labelled(Path(str(data)), columns, label, max_length, truncate, samples, seed)
            figures = task_figures(members[0], source.path, tokenizer, labelled, gates, place, dtype)
    shown = tuple((one.reference, one.folder.manifest.digest, one.weight) for one in members)
    digest = record(members[0].folder, figures, entries).digest if record_in else None
    if out is not None:
        now = [(reference, digest or found, weight) for reference, found, weight in shown]
        write(Path(out), canonical(_document(now, mix, origin.fingerprint.weights, figures)))
    require_passed(gates, figures, str(out or members[0].reference), "train it longer, on other rows, or less")
    return Evaluated(
        shown, source.reference, figures, described(place), overrides, None if out is None else Path(out), digest
    )


def _require_one(members: list[Term]) -> None:
    """Refuses to record what is not of one adapter in a folder of the user's own."""
    one = members[0]
    own = parse_reference(one.reference).path is not None and one.folder.manifest.kind == "adapter"
    if len(members) > 1 or one.weight != 1.0 or not own:
        what, want = "figures are recorded in one adapter, in a folder of your own", "one folder, weight 1"
        have = [f"{term.weight:g}*{term.reference}" for term in members]
        raise HubkitError("HK-OPTIONS", what, want=want, have=have, fix="--out eval.json", status=USAGE)
    require_recordable(one.folder)


def _rows(
    live: Any, base: Path, tokenizer: Any, data: Any, general: Any, how: Mapping[str, Any]
) -> tuple[list[Row], list[Row], dict[str, str]]:
    """Held-out and general rows, and the names of their files; the base's context has room for virtual tokens."""
    from hubkit.tensors.base.decoder import context_of_folder
    from hubkit.tensors.parts.part import front_length
    from hubkit.training.measuring.figures import GENERAL, rows_to_measure

    front = max((front_length(adapter.parts.values()) for adapter in live.adapters.values()), default=0)
    context = context_of_folder(base)
    room = None if context is None else context - front
    longest = room if how["max_length"] is None else min(how["max_length"], room or how["max_length"])
    rest = {"raw": how["raw"], "front": front}
    held: list[Row] = []
    if data is not None:
        cut = {"longest": longest, "truncate": how["truncate"]}
        held = rows_to_measure(Path(data), tokenizer, how["columns"], **cut, **rest)
    path = GENERAL if general is None else Path(general)
    usual = rows_to_measure(path, tokenizer, None, longest=longest, truncate=True, **rest)
    names = {"general": "hubkit's general rows" if general is None else path.name}
    return held, usual, names if data is None else {**names, "heldout": Path(data).name}


def _document(members: Any, mix: str, weights: str | None, figures: Mapping[str, Any]) -> dict[str, Any]:
    listed = [{"reference": ref, "digest": digest, "weight": weight} for ref, digest, weight in members]
    return {"schema": SCHEMA, "adapters": listed, "mix": mix, "base": weights or "", "figures": figures}
