"""What a training leaves behind: whether it may be written, and what its manifest says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.documents.files import refusing
from hubkit.errors import HubkitError
from hubkit.named.runs.continuing import Start
from hubkit.named.runs.judging import Judge
from hubkit.named.writing import document_of

if TYPE_CHECKING:
    from hubkit.documents.manifest import Manifest
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.training.events import Metrics
    from hubkit.training.options import TrainOptions
    from hubkit.training.rows.encode import Row


def may_replace(out: Path, replace: bool, unfinished: bool, resume: bool) -> bool:
    """Whether what is at `out` may be replaced; a resumed run replaces what it may have written before it was killed.

    Raises:
        HubkitError: ``HK-EXISTS``.
    """
    with refusing(out):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return True
    if not replace and not unfinished:
        what = "is complete: there is nothing to resume" if resume else "exists already"
        fix = "--replace to train it again, or another --out"
        raise HubkitError("HK-EXISTS", f"{out.name!r} {what}", where=str(out), fix=fix)
    return True


def manifest_of(
    draft: Manifest,
    adapter: Adapter,
    start: Start,
    judge: Judge,
    training: Mapping[str, Any],
    incomplete: bool,
    task: Mapping[str, Any] | None = None,
) -> Manifest:
    """`draft` with what is known when the training is done.

    Args:
        incomplete: whether the base was allowed to lack weights.
        task: kind, labels and head, of a task with labels.
    """
    from hubkit.tensors.base.agreement import INCOMPLETE

    return dataclasses.replace(
        draft,
        config=document_of(adapter.config),
        training=training,
        task=task,
        evaluation=judge.figures,
        parents=start.parents,
        overrides=(INCOMPLETE,) if incomplete else (),
    )


def training_of(options: TrainOptions, rows: list[Row], metrics: Metrics, origin: Mapping[str, str]) -> dict[str, Any]:
    """How it was trained: rows by digest, options, metrics, and where the rows came from."""
    from hubkit.training.options import WITHOUT_INFLUENCE
    from hubkit.training.rows.encode import rows_digest

    settings = {k: v for k, v in options.to_document().items() if v is not None and k not in WITHOUT_INFLUENCE}
    found = {"data": rows_digest(rows), "options": settings, "metrics": metrics.to_document()}
    return found | ({"origin": dict(origin)} if origin else {})
