"""Heads with one output for each label: that of a base's files, or one that is to be made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubkit.errors import HubkitError
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.tokenizer import load_tokenizer
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.parts.heads import TaskModel, head_sites, spare_tensors
from hubkit.training.rows.data import shorten

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


def head_for(task: str, folder: Path, outputs: int) -> Head:
    """The head of the base in `folder` for a task: that of its files, or one that is to be made.

    Args:
        task: kind of a task whose model gives one output for each label.
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
        want = f"an architecture of which transformers has a model for {task}"
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
    what, fix = "the base cannot be given a head for labels", "another base"
    return HubkitError("HK-HEAD", what, where=str(folder), want=want, have=have, fix=fix)


def label_names(found: tuple[str, ...], head: Head) -> tuple[str, ...]:
    """The labels in the order of the head's outputs: the base's own names, else those `found` in the rows.

    Raises:
        HubkitError: ``HK-LABELS``.
    """
    if head.names:
        return head.names
    if len(found) != head.outputs:
        raise bad_labels("labels and head do not fit", f"{head.outputs} labels, as the base's head has outputs", found)
    return found


def labels_of(document: Mapping[str, Any], head: Head) -> tuple[str, ...]:
    """The labels of an adapter, in the order of the head's outputs: ``HK-HEAD`` where that has not as many.

    Args:
        document: the ``task`` of its manifest.
    """
    labels = tuple(map(str, document.get("labels", ())))
    if len(labels) != head.outputs:
        have = f"{head.outputs} outputs"
        raise HubkitError("HK-HEAD", "labels and head do not fit", want=f"{len(labels)} outputs", have=have)
    return labels


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels, each once, sorted: numbers as numbers.

    Raises:
        HubkitError: ``HK-LABELS`` for fewer than two.
    """
    found = sorted({*labels}, key=_order)
    if len(found) < 2:
        raise bad_labels("the rows have one label only: there is nothing to tell apart", "two labels or more", found)
    return found


def _order(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def bad_labels(what: str, want: str, have: Sequence[str], where: str = "") -> HubkitError:
    """``HK-LABELS``."""
    fix = "correct the rows, or name the labels in id2label of the base's config.json"
    return HubkitError("HK-LABELS", what, where=where, want=want, have=shorten(have), fix=fix)
