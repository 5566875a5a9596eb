"""The tasks that there are, and what goes together with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hubkit.errors import USAGE, HubkitError
from hubkit.training.tasks.classification import Classification
from hubkit.training.tasks.task import Task

KINDS: Mapping[str, type[Task]] = {task.kind: task for task in (Classification,)}

FOREIGN = {
    "raw": "--raw",
    "general": "--general",
    "incomplete": "--allow-incomplete-base",
    "packing": "--packing",
    "compile": "--compile",
    "chunked_loss": "--chunked-loss",
}
"""Arguments of a training that say something of language models, or that no task has been tried with."""


def require_applicable(task: str | None, label: str | None, given: Mapping[str, Any]) -> None:
    """Refuses arguments that do not go together with a task, or without one: ``HK-OPTIONS``.

    Args:
        given: arguments and options as they were given, by name.
    """
    if task is None:
        if label:
            fix = f"--task {next(iter(KINDS))}"
            raise HubkitError("HK-OPTIONS", "label belongs to a task", have=f"--label {label}", fix=fix, status=USAGE)
        return
    if task not in KINDS:
        want = f"one of {', '.join(KINDS)}"
        raise HubkitError("HK-OPTIONS", "task is no choice", want=want, have=repr(task), status=USAGE)
    have = [option for name, option in FOREIGN.items() if given.get(name)]
    if have:
        what, fix = f"these do not apply to the task {task}", f"leave out {', '.join(have)}"
        raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)
