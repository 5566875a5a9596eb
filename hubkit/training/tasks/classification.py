"""Classification: one label for each row, by a head that the base's files hold or that is made for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.parts.heads import STD, TaskModel, head_sites, spare_tensors
from hubkit.training.rows.batching import collate, plan_evaluation
from hubkit.training.rows.data import Columns, Record, shorten
from hubkit.training.rows.encode import Row
from hubkit.training.rows.labelled import Labelled
from hubkit.training.tasks.metrics import scores

CLASSIFICATION = "classification"
LABELS = ("label", "labels", "class")
TEXTS = ("text", "sentence")
_UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Head:
    """The head of a model.

    Args:
        sites: its modules, by name.
        names: the base's own names of the labels, in order; none where nobody named them, and of a head that was made.
        outputs: how many labels it has.
        pad: the id that pads rows.
        model: how the model is made of the base's files.
    """

    sites: tuple[str, ...]
    names: tuple[str, ...]
    outputs: int
    pad: int
    model: TaskModel

    def std(self, config: Any) -> float:
        """Of the weights that are drawn for it, by the base's configuration."""
        found = getattr(config, "initializer_range", None)
        return float(found) if isinstance(found, int | float) and found > 0 else STD


def head_for(task: str, folder: Path, outputs: int) -> Head:
    """The head of the base in `folder` for a task: that of its files, or one that is to be made.

    Args:
        outputs: labels of a head that is made.

    Raises:
        HubkitError: ``HK-HEAD`` where transformers has no such model of this base, a head of its own chooses no label
            of several, or nothing pads rows; ``HK-BASE-LOAD``; ``HK-CODEC`` for a base in 4 bits.
    """
    stored, plain = Base.from_folder(folder), TaskModel(task)
    if any(site.packed for site in stored.sites.values()):
        what, fix = "a base in 4 bits is loaded as a language model only", "a base in 16 bits"
        raise HubkitError("HK-CODEC", what, where=str(folder), want="a base that is not quantized", fix=fix)
    try:
        model: Any = outline(folder, plain)
    except HubkitError as error:
        if error.code != "HK-BASE-LOAD":
            raise
        want = "an architecture that transformers has a classifier of"
        raise _no_head(folder, want, [error.what, *error.have]) from error
    config = model.config
    names: tuple[str, ...] = ()
    sites, lacking = head_sites(model, stored, folder)
    if lacking:
        own = TaskModel(task, outputs)
        sites, lacking = head_sites(outline(folder, own), stored, folder)
    else:
        own, outputs = plain, config.num_labels
        if getattr(config, "problem_type", None) not in (None, "single_label_classification") or outputs < 2:
            have = f"{outputs} outputs, problem_type {config.problem_type}"
            raise _no_head(folder, "a head that chooses one of several labels", have)
        names = tuple(config.id2label[n] for n in range(outputs))
        names = () if all(_UNNAMED.fullmatch(name) for name in names) else names
    given, pad = config.pad_token_id, config.pad_token_id
    if pad is None:
        tokenizer = load_tokenizer(folder)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None or pad < 0:
        have = "none: the last token of a padded row cannot be found"
        raise _no_head(folder, "pad_token_id in config.json, or a padding token of the tokenizer", have)
    kinds = getattr(config, "architectures", None) or ()
    spare = spare_tensors(kinds, config, open_shards(folder).headers) if lacking else frozenset()
    live = Base.from_model(model).sites
    without = tuple(n for n, s in stored.sites.items() if n not in live and (s.tensor in spare or s.tied))
    own = replace(own, pad=pad if given is None else None, made=lacking, spare=spare, without=without)
    return Head(sites, names, outputs, pad, own)


def _no_head(folder: Path, want: str, have: str | Sequence[str]) -> HubkitError:
    what, fix = "the base cannot be made a classifier", "another base"
    return HubkitError("HK-HEAD", what, where=str(folder), want=want, have=have, fix=fix)


def row_labels(records: Sequence[Record], column: str) -> tuple[str, ...]:
    """The labels of `records`, sorted: numbers as numbers.

    Raises:
        HubkitError: ``HK-LABELS``, also for one label only.
    """
    found = sorted({_label(record, column) for record in records}, key=_order)
    if len(found) < 2:
        raise _bad_labels("the rows have one label only: there is nothing to tell apart", "two labels or more", found)
    return tuple(found)


def label_names(found: tuple[str, ...], head: Head) -> tuple[str, ...]:
    """The labels in the order of the head's outputs: the base's own names, else those `found` in the rows.

    Raises:
        HubkitError: ``HK-LABELS``.
    """
    if head.names:
        return head.names
    if len(found) != head.outputs:
        raise _bad_labels("labels and head do not fit", f"{head.outputs} labels, as the base's head has outputs", found)
    return found


def _order(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def _label(record: Record, column: str) -> str:
    value = record.values.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _bad_labels(f"column {column!r} holds no label", "text or a whole number", [repr(value)], record.where)
    return str(value)


def _bad_labels(what: str, want: str, have: Sequence[str], where: str = "") -> HubkitError:
    fix = "correct the rows, or name the labels in id2label of the base's config.json"
    return HubkitError("HK-LABELS", what, where=where, want=want, have=shorten(have), fix=fix)


def labelled_rows(
    records: Sequence[Record],
    names: Sequence[str],
    columns: tuple[str, str],
    head: Head,
    tokenizer: Any,
    longest: int,
    truncate: bool,
) -> list[Labelled]:
    """One row per record.

    Args:
        names: the label set, in the order of the head's outputs.
        columns: of the text and of the label.
        longest: most tokens of a row.

    Raises:
        HubkitError: ``HK-LABELS`` for labels that are not in the set; ``HK-DATA``; ``HK-ROW-TOO-LONG``.
    """
    text, column = columns
    number = {name: n for n, name in enumerate(names)}
    strange = [f"{r.where}: {_label(r, column)!r}" for r in records if _label(r, column) not in number]
    if strange:
        raise _bad_labels(f"{len(strange)} labels are not in the label set", ", ".join(names), strange)
    bad = [r.where for r in records if not isinstance(r.values.get(text), str) or not str(r.values[text]).strip()]
    if bad:
        raise HubkitError("HK-DATA", f"column {text!r} holds no text", want="text in each row", have=shorten(bad))
    rows, long = [], []
    for record in records:
        ids = list(tokenizer(record.values[text], add_special_tokens=True)["input_ids"])
        if len(ids) > longest and truncate:  # the tokenizer's own way keeps the special tokens
            ids = list(tokenizer(record.values[text], truncation=True, max_length=longest)["input_ids"])
        long += [f"{record.where}: {len(ids)} tokens"] * (len(ids) > longest)
        rows.append(Labelled.of(ids, number[_label(record, column)], head.pad, record.where))
    if long:
        want, fix = f"at most {longest} tokens", "shorter rows, or --truncate"
        raise HubkitError("HK-ROW-TOO-LONG", "rows are longer than the context", want=want, have=shorten(long), fix=fix)
    return rows


def text_column(records: Sequence[Record], columns: Columns | None) -> str:
    """The column of text: what is asked, else what is called so; ``HK-COLUMNS`` for none."""
    return _column(records, columns.text if columns else None, TEXTS, "--text")


def columns_of(records: Sequence[Record], columns: Columns | None, label: str | None) -> tuple[Columns, str]:
    """The columns of text and label: what is asked, else what is called so.

    Raises:
        HubkitError: ``HK-COLUMNS``, also for columns that this task does not read.
    """
    other = [name for name in (columns.names() if columns else ()) if columns and name != columns.text]
    if other:
        what = "the task reads a column of text and one of labels"
        raise HubkitError("HK-COLUMNS", what, want="--text, --label", have=other)
    return Columns(text=text_column(records, columns)), _column(records, label, LABELS, "--label")


def _column(records: Sequence[Record], asked: str | None, names: Sequence[str], option: str) -> str:
    present = records[0].values
    found = asked or next((name for name in names if name in present), None)
    if found is None or found not in present:
        want, fix = asked or " or ".join(names), f"{option} COLUMN"
        raise HubkitError("HK-COLUMNS", "a column is not there", want=want, have=list(present), fix=fix)
    return found


def measured(model: nn.Module, rows: Sequence[Row], batch_size: int) -> dict[str, float]:
    """`scores` of `model` on `rows`, dropout off.

    Args:
        model: gives logits (rows, labels).
    """
    truth, guessed = [], []
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for batch in plan_evaluation([len(row.ids) for row in rows], batch_size):
            inputs = collate([rows[n] for n in batch], device)
            truth += inputs.pop("labels").tolist()
            guessed += model(**inputs).logits.argmax(-1).tolist()
    return scores(truth, guessed)
