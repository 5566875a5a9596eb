"""The task of a training: by its rows, or by the adapter that it goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.errors import USAGE, HubkitError
from hubkit.named.runs.continuing import Start

if TYPE_CHECKING:
    from hubkit.training.rows.data import Record
    from hubkit.training.tasks.task import Asked, Task


def require_same_task(task: str | None, start: Start) -> None:
    """Refuses to go on with an adapter of another task, before rows or base are read: ``HK-OPTIONS``."""
    if start.folder is None:
        return
    own = (start.folder.manifest.task or {}).get("kind")
    if own != task:
        want, have = (f"--task {one}" if one else "no --task" for one in (own, task))
        what, where = "--from goes on with the adapter's own task", str(start.folder.path)
        raise HubkitError("HK-OPTIONS", what, where=where, want=want, have=have, fix=want, status=USAGE)


def task_of(kind: str, records: Sequence[Record], asked: Asked, base: Path, start: Start) -> Task:
    """The task of a training, with the labels of what it goes on from, if it does.

    Args:
        kind: by name, one that is known.
        records: to train on.
        base: its folder.

    Raises:
        HubkitError: what `Task.of`, `Task.known` and `Task.columns` raise.
    """
    from hubkit.training.tasks.kinds import KINDS

    if start.folder is None:
        return KINDS[kind].of(records, asked, base)
    task = KINDS[kind].known(start.folder.manifest.task or {}, base).on(records, asked)
    task.require_learnable(records)
    return task
