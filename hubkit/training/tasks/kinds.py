"""The tasks that there are, and what goes together with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hubkit.errors import USAGE, HubkitError
from hubkit.training.tasks.classification import Classification
from hubkit.training.tasks.embedding import Embedding
from hubkit.training.tasks.names import TASKS
from hubkit.training.tasks.task import Task
from hubkit.training.tasks.tokens import TokenClassification

KINDS: Mapping[str, type[Task]] = {task.kind: task for task in (Classification, TokenClassification, Embedding)}

FOREIGN = {
    "raw": "--raw",
    "require": "--require",
    "general": "--general",
    "parent": "--from",
    "incomplete": "--allow-incomplete-base",
    "packing": "--packing",
    "compile": "--compile",
    "shard": "--shard",
    "chunked_loss": "--chunked-loss",
}
"""Arguments of a training that say something of language models, or that no task has been tried with."""


def require_applicable(task: str | None, label: str | None, given: Mapping[str, Any], processes: int) -> None:
    """Refuses arguments that do not go together with a task, or without one: ``HK-OPTIONS``.

    Args:
        given: arguments and options as they were given, by name.
        processes: of the launch.
    """
    if task is None:
        said = {"--label": label, "--text-pair": given.get("text_pair"), "--labels": ",".join(given.get("labels", ()))}
        if have := [f"{option} {value}" for option, value in said.items() if value]:
            what, fix = f"{have[0].split()[0][2:]} belongs to a task", f"--task {next(iter(KINDS))}"
            raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)
        return
    if task not in KINDS:
        want = f"one of {', '.join(TASKS)}"
        raise HubkitError("HK-OPTIONS", "task is no choice", want=want, have=repr(task), status=USAGE)
    have = [option for name, option in FOREIGN.items() if given.get(name)]
    have += ["--text-pair"] * bool(given.get("text_pair") and task == TokenClassification.kind)
    if task == Embedding.kind:
        have += ["--label"] * bool(label) + ["--labels"] * bool(given.get("labels"))
    have += [f"{processes} processes"] * (processes > 1)
    if have:
        what, fix = f"these do not apply to the task {task}", f"leave out {', '.join(have)}"
        raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)
