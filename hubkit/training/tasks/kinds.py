"""The tasks that there are, and what goes together with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.tokenizer import is_seq2seq
from hubkit.training.tasks.classification import Classification
from hubkit.training.tasks.names import CAUSAL_LM, SEQ2SEQ
from hubkit.training.tasks.seq2seq import Seq2Seq, no_encoder
from hubkit.training.tasks.task import Task

KINDS: Mapping[str, type[Task]] = {task.kind: task for task in (Classification, Seq2Seq)}

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


def task_for(asked: str | None, base: Path) -> str | None:
    """The task of a training on the base in folder `base`; None: a language model's, the next token.

    An encoder-decoder is trained to write a text for a text, unless another task is asked for.

    Raises:
        HubkitError: ``HK-HEAD`` where the base is not what is asked for.
    """
    both = is_seq2seq(base)
    if asked == SEQ2SEQ and not both:
        raise no_encoder(base)
    if asked == CAUSAL_LM and both:
        what, want = "an encoder-decoder is no causal language model", "a decoder"
        raise HubkitError("HK-HEAD", what, where=str(base), want=want, fix=f"--task {SEQ2SEQ}")
    if asked is None and both:
        return SEQ2SEQ
    return None if asked == CAUSAL_LM else asked


def require_applicable(task: str | None, label: str | None, given: Mapping[str, Any], processes: int) -> None:
    """Refuses arguments that do not go together with a task, or without one: ``HK-OPTIONS``.

    Args:
        given: arguments and options as they were given, by name.
        processes: of the launch.
    """
    if task in (None, CAUSAL_LM):
        if label:
            fix = f"--task {next(iter(KINDS))}"
            raise HubkitError("HK-OPTIONS", "label belongs to a task", have=f"--label {label}", fix=fix, status=USAGE)
        return
    if task not in KINDS:
        want = f"one of {', '.join((CAUSAL_LM, *KINDS))}"
        raise HubkitError("HK-OPTIONS", "task is no choice", want=want, have=repr(task), status=USAGE)
    have = [option for name, option in FOREIGN.items() if given.get(name)]
    have += [f"{processes} processes"] * (processes > 1)
    if have:
        what, fix = f"these do not apply to the task {task}", f"leave out {', '.join(have)}"
        raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)
