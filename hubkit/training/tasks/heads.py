"""Heads with one output for each label: that of a base's files, or one that is to be made."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubkit.errors import HubkitError
from hubkit.tensors.base.agreement import outline
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.tokenizer import HEADED, load_tokenizer
from hubkit.tensors.files.shards import open_shards
from hubkit.tensors.parts.heads import POOLER, Made, TaskModel, head_sites, spare_tensors
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
        types: kinds of text that the base tells apart in one row, as the first and the second of a pair; 0 or 1: none.
    """

    sites: tuple[str, ...]
    names: tuple[str, ...]
    outputs: int
    pad: int
    model: TaskModel
    types: int = 0


def head_for(task: str, folder: Path, outputs: int, asked: Sequence[str] = (), anew: bool = False) -> Head:
    """The head of the base in `folder` for a task: that of its files, or one that is to be made.

    A head of the files that was saved for another task, or that chooses among other labels than `asked`, is not taken:
    one is made in its place. So much of it as does not depend on the labels is kept.

    Args:
        task: kind of a task whose model gives one output for each label.
        outputs: labels of a head that is made.
        asked: the labels in the order that a user gave; none where he gave none.
        anew: make one in any case.

    Raises:
        HubkitError: ``HK-HEAD`` where transformers has no such model of this base, a head of its own chooses no label
            of several, or nothing pads rows; ``HK-LABELS`` for `asked` in another order than the head of the files has
            them; ``HK-BASE-LOAD``; ``HK-CODEC`` for a base in 4 bits.
    """
    stored, plain = Base.from_folder(folder), TaskModel(task)
    if any(site.packed for site in stored.sites.values()):
        what, fix = "a base whose files are in 4 bits is loaded as a language model only", "the base in 16 bits"
        raise HubkitError("HK-CODEC", what, where=str(folder), want="a base that is not quantized", fix=fix)
    model = _outline(folder, plain)
    config, names, replaced = model.config, tuple[str, ...](), dict[str, Made]()
    sites, lacking = head_sites(model, stored, folder)
    if not lacking and _saved_for(task, config) and not anew:
        names = _names(config)
        anew = bool(asked) and not _fits(asked, names, config.num_labels)
    else:
        anew = not lacking
    if lacking or anew:
        own = TaskModel(task, outputs)
        sites, lacking = head_sites(outline(folder, own), stored, folder)
        replaced, names = (_choosing(folder, own) if anew else {}), ()
    else:
        own, outputs = plain, config.num_labels
        _require_choice(task, config, folder)
    given, pad = config.pad_token_id, _pad(task, config, folder)
    kinds = getattr(config, "architectures", None) or ()
    made, live = lacking | replaced, Base.from_model(model).sites
    idle = [s for name, s in stored.sites.items() if name not in live and POOLER in name.split(".")]
    spare = {name for site in idle for name in (site.tensor, site.bias_tensor) if name}
    spare |= spare_tensors(kinds, config, open_shards(folder).headers) if lacking else set()
    without = [n for n, s in stored.sites.items() if (n not in live and (s.tensor in spare or s.tied)) or n in replaced]
    told = pad if given is None and task == "classification" else None  # it finds the last token by it
    own = replace(own, pad=told, made=made, spare=frozenset(spare), without=tuple(without))
    return Head(sites, names, outputs, pad, own, int(getattr(config, "type_vocab_size", None) or 0))


def _outline(folder: Path, plain: TaskModel) -> Any:
    """The model of a task on the meta device: ``HK-HEAD`` where transformers has none."""
    try:
        return outline(folder, plain)
    except HubkitError as error:
        if error.code != "HK-BASE-LOAD":
            raise
        want = f"an architecture of which transformers has a model for {plain.kind}"
        raise _no_head(folder, want, [error.what, *error.have]) from error


def _saved_for(task: str, config: Any) -> bool:
    """Whether the head of the files is one for the task, as far as the configuration says."""
    saved = getattr(config, "architectures", None) or ()
    return not saved or any(str(name).endswith(HEADED[task]) for name in saved)


def _names(config: Any) -> tuple[str, ...]:
    """The labels as the base's files name them; none where nobody named them."""
    names = tuple(str(config.id2label[n]) for n in range(config.num_labels))
    return () if all(_UNNAMED.fullmatch(name) for name in names) else names


def _fits(asked: Sequence[str], names: Sequence[str], outputs: int) -> bool:
    """Whether a head of the files chooses among the labels that were asked for."""
    if names and tuple(asked) != tuple(names) and sorted(asked) == sorted(names):
        what, want = "the head of the base's files has these labels in another order", f"--labels {','.join(names)}"
        raise bad_labels(what, want, [f"--labels {','.join(asked)}"])
    return tuple(asked) == tuple(names) if names else len(asked) == outputs


def _choosing(folder: Path, own: TaskModel) -> dict[str, Made]:
    """The modules of a head whose shape depends on the number of labels."""
    sites = Base.from_model(outline(folder, own)).sites
    more = Base.from_model(outline(folder, replace(own, outputs=(own.outputs or 0) + 1))).sites
    return {n: Made(s.kind, s.shape, s.bias_tensor is not None) for n, s in sites.items() if more[n].shape != s.shape}


def _require_choice(task: str, config: Any, folder: Path) -> None:
    """Refuses a head that does not choose one of several labels: ``HK-HEAD``."""
    kind = getattr(config, "problem_type", None) if task == "classification" else None
    if kind not in (None, "single_label_classification") or config.num_labels < 2:
        have = f"{config.num_labels} outputs, problem_type {config.problem_type}"
        raise _no_head(folder, "a head that chooses one of several labels", have)


def _pad(task: str, config: Any, folder: Path) -> int:
    """The id that pads rows: ``HK-HEAD`` for none, where the last token is found by it."""
    pad = config.pad_token_id
    if pad is None:
        tokenizer = load_tokenizer(folder)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is not None and pad >= 0:
        return int(pad)
    if task == "token-classification":  # the mask alone says what is padded
        return 0
    have = "none: the last token of a padded row cannot be found"
    raise _no_head(folder, "pad_token_id in config.json, or a padding token of the tokenizer", have)


def _no_head(folder: Path, want: str, have: str | Sequence[str]) -> HubkitError:
    what, fix = "the base cannot be given a head for labels", "another base"
    return HubkitError("HK-HEAD", what, where=str(folder), want=want, have=have, fix=fix)


def given_labels(asked: Sequence[str]) -> tuple[str, ...]:
    """The labels that a user gave, in his order: ``HK-LABELS`` for fewer than two, one twice, or an empty one."""
    twice = sorted({label for label in asked if list(asked).count(label) > 1})
    if asked and (len(asked) < 2 or twice or not all(label.strip() for label in asked)):
        what, want = "the labels that are given are no label set", "two labels or more, each once"
        raise bad_labels(what, want, [repr(label) for label in twice or asked])
    return tuple(asked)


def numbered(label: str, asked: Sequence[str]) -> str:
    """What a row calls a label: a whole number counts into the labels that are given, where none of these is one."""
    if asked and label.isdecimal() and not any(one.isdecimal() for one in asked) and int(label) < len(asked):
        return asked[int(label)]
    return label


def unheld(labels: Sequence[str], found: Collection[str]) -> tuple[str, ...]:
    """What is to be said of labels that no row holds."""
    absent = [label for label in labels if label not in found]
    return (f"labels that no row holds: {', '.join(absent)}",) if absent else ()


def label_names(found: Sequence[str], head: Head, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """The labels in the order of the head's outputs: the base's own names, else those `asked`, else those of the rows.

    Args:
        found: labels of the rows.

    Raises:
        HubkitError: ``HK-LABELS``.
    """
    names = head.names or tuple(asked) or tuple(found)
    if len(names) != head.outputs:
        raise bad_labels("labels and head do not fit", f"{head.outputs} labels, as the base's head has outputs", names)
    return names


def made_anew(document: Mapping[str, Any]) -> bool:
    """Whether the head of an adapter, by its manifest's ``task``, stands in the place of one of the base's files."""
    return not set(document.get("made", ())).isdisjoint(document.get("without", ()))


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
    fix = "correct the rows, or give the labels, in order: --labels A,B,C"
    return HubkitError("HK-LABELS", what, where=where, want=want, have=shorten(have), fix=fix)
