"""The tasks that there are, and what goes together with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hubkit.errors import USAGE, HubkitError
from hubkit.training.tasks.classification import Classification
from hubkit.training.tasks.names import LANGUAGE, TASKS
from hubkit.training.tasks.task import Asked, Task
from hubkit.training.tasks.tokens import TokenClassification

KINDS: Mapping[str, type[Task]] = {task.kind: task for task in (Classification, TokenClassification)}

FOREIGN = {
    "raw": "--raw",
    "general": "--general",
    "incomplete": "--allow-incomplete-base",
    "packing": "--packing",
    "compile": "--compile",
    "chunked_loss": "--chunked-loss",
}
"""Arguments of a training that say something of language models, or that no task has been tried with."""


def applicable(task: str | None, asked: Asked, given: Mapping[str, Any]) -> str | None:
    """The task that is meant, None for language modelling; ``HK-OPTIONS`` for what does not go together with it.

    Args:
        asked: of the rows.
        given: arguments and options as they were given, by name.
    """
    if task in (None, LANGUAGE):
        said = {"--label": asked.label, "--text-pair": asked.pair, "--labels": ",".join(asked.labels)}
        if have := [f"{option} {value}" for option, value in said.items() if value]:
            what, fix = f"{have[0].split()[0][2:]} belongs to a task", f"--task {next(iter(KINDS))}"
            raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)
        return None
    if task not in KINDS:
        want = f"one of {', '.join(TASKS)}"
        raise HubkitError("HK-OPTIONS", "task is no choice", want=want, have=repr(task), status=USAGE)
    have = [option for name, option in FOREIGN.items() if given.get(name)]
    have += ["--text-pair"] * bool(asked.pair and task != Classification.kind)
    if have:
        what, fix = f"these do not apply to the task {task}", f"leave out {', '.join(have)}"
        raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)
    return task
