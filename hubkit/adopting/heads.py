"""The head for labels of an adapter that another tool wrote: found by its tensors, never guessed.

PEFT and AdapterHub load an adapter onto whatever head the model has, and draw one by chance where the files have none.
Here the base's class says which modules its head has, the tensors how many outputs; what is missing is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.task_types import LABELS_NAME, TASK_TYPES
from hubkit.documents.files import read
from hubkit.documents.schema import MAX_BYTES, parse
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base
    from hubkit.training.tasks.heads import Head
    from hubkit.training.tasks.task import Task

Shape = tuple[int, ...]


def task_of(
    kind: str | None, whole: Mapping[str, Shape], folder: Path, base: Base, labels: Sequence[str] | None, where: str
) -> Task | None:
    """The task of an adapter, with the head that its tensors are of; None where it is a language model's.

    On an encoder-decoder it is that one's own. Also None for a task that hubkit does not train, and for a base with a
    head of its own that chooses no label.

    Args:
        kind: of the task, as `hubkit.artifact.task_types` has it.
        whole: modules whose values the adapter holds -> shape of their weight in the file.
        folder: the base's.
        base: its sites.
        labels: names of the labels, in the order of the outputs; None where nobody gave any.
        where: the file, for messages.

    Raises:
        HubkitError: ``HK-HEAD`` for a head that is not the one that the class makes, or is not all there;
            ``HK-LABELS`` for another number of labels than it has outputs, or labels for an adapter without a head.
    """
    from hubkit.training.tasks.kinds import KINDS

    if kind is None or kind not in KINDS:
        require_no_labels(labels, where)
        return _of_base(folder) if base.encodes else None
    head = _head(kind, whole, folder, base, where)
    if head is None:
        require_no_labels(labels, where)
        return None
    unnamed = [f"LABEL_{n}" for n in range(head.outputs)]
    named = list(labels) if labels is not None else list(head.names) or unnamed
    if len({*named}) != head.outputs or len(named) != head.outputs or not all(named):
        want = f"{head.outputs} names, each once, in the order of the head's outputs"
        fix = f"--labels {','.join(unnamed)}, with the names that they have"
        raise HubkitError("HK-LABELS", "labels and head do not fit", where=where, want=want, have=named, fix=fix)
    return KINDS[kind].known({"kind": kind, "labels": named}, folder)


def _of_base(folder: Path) -> Task | None:
    """The task of what writes text on an encoder-decoder; None where the base in `folder` is not made for that."""
    from hubkit.training.tasks.seq2seq import Seq2Seq

    try:
        return Seq2Seq.known({}, folder)
    except HubkitError as error:
        if error.code not in ("HK-HEAD", "HK-BASE-LOAD"):
            raise
        return None


def require_no_labels(labels: Sequence[str] | None, where: str) -> None:
    """Refuses labels for an adapter that gives none: ``HK-LABELS``."""
    if labels:
        what, fix = "the adapter has no head that chooses a label", "leave --labels out"
        raise HubkitError("HK-LABELS", what, where=where, have=list(labels), fix=fix)


def labels_beside(folder: Path) -> list[str] | None:
    """The labels in the ``labels.json`` of a folder, in order; None without one.

    Raises:
        HubkitError: ``HK-LABELS``, ``HK-JSON``.
    """
    path = folder / LABELS_NAME
    if not path.is_file():
        return None
    found = parse(read(path, MAX_BYTES), str(path)).get("id2label")
    names = found if isinstance(found, Mapping) else {}
    labels = [names.get(str(n)) for n in range(len(names))]
    if not labels or not all(isinstance(label, str) for label in labels):
        want = 'id2label: {"0": "first", "1": "second", ...}'
        raise HubkitError("HK-LABELS", "the names of the labels cannot be read", where=str(path), want=want)
    return [str(label) for label in labels]


def _head(kind: str, whole: Mapping[str, Shape], folder: Path, base: Base, where: str) -> Head | None:
    """The head of the base's class for which the tensors of `whole` are; None where the base has another of its own."""
    from hubkit.training.tasks.heads import head_for

    lasts = TASK_TYPES[kind].heads
    found: list[tuple[list[str], Head]] = []
    wanted = {name: shape for name, shape in whole.items() if name not in base.sites}
    sizes = {shape[0] for name, shape in whole.items() if len(shape) == 2 and (name in wanted or _is_in(name, lasts))}
    for size in sorted(sizes) or [2]:
        try:
            head = head_for(kind, folder, size)
        except HubkitError as error:
            if error.code not in ("HK-HEAD", "HK-CODEC") or not any(_is_in(name, lasts) for name in base.sites):
                raise
            return None
        if not head.model.made:
            return head
        lacking = [f"{name}: not in the file" for name in head.model.made if name not in whole]
        absent = [f"{name}: the class has no such module" for name in wanted if name not in head.model.made]
        other = [
            f"{name}: {whole[name]}, not {head.model.tensors[f'{name}.weight']}"
            for name in head.model.made
            if name in whole and whole[name] != head.model.tensors[f"{name}.weight"]
        ]
        found.append(([*lacking, *absent, *other], head))
    faults, head = min(found, key=lambda one: len(one[0]))
    strange = [name for name in wanted if name not in head.model.made]
    if head.outputs < 2:
        faults = [*faults, f"{head.outputs} output: a number, not a label"]
    if faults:
        own = base.arch.prefix.removesuffix(".")
        saved = sorted({name.removeprefix(f"{own}.").split(".")[0] for name in head.model.made if name not in whole})
        again = f"train again with modules_to_save={saved}" if saved else "train again"
        again = "--base with the base that it was trained on" if strange else again
        raise HubkitError(
            "HK-HEAD",
            "the adapter does not hold the head that its task needs and its base lacks: one would be drawn by chance",
            where=where,
            want=[f"{name}: {head.model.tensors[f'{name}.weight']}" for name in head.model.made],
            have=faults,
            fix=f"{again}; or save base and head with save_pretrained and name that folder with --base",
        )
    return head


def _is_in(name: str, heads: Sequence[str]) -> bool:
    """Whether a module is one of these heads, or in one."""
    return name.partition(".")[0] in heads
