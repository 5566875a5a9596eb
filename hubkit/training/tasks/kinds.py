"""The tasks that there are, and what goes together with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.tokenizer import is_seq2seq
from hubkit.training.tasks.classification import Classification
from hubkit.training.tasks.embedding import Embedding
from hubkit.training.tasks.names import CAUSAL_LM, SEQ2SEQ, TASKS
from hubkit.training.tasks.seq2seq import Seq2Seq, no_encoder
from hubkit.training.tasks.task import Asked, Task
from hubkit.training.tasks.tokens import TokenClassification

KINDS: Mapping[str, type[Task]] = {
    task.kind: task for task in (Seq2Seq, Classification, TokenClassification, Embedding)
}

FOREIGN = {
    "raw": "--raw",
    "general": "--general",
    "incomplete": "--allow-incomplete-base",
    "packing": "--packing",
    "compile": "--compile",
    "chunked_loss": "--chunked-loss",
}
"""Arguments of a training that say something of language models, or that no task has been tried with."""


def task_for(task: str | None, base: Path, asked: Asked, given: Mapping[str, Any]) -> str | None:
    """The task of a training on the base in folder `base`; None: a language model's, the next token.

    An encoder-decoder is trained to write a text for a text, unless another task is asked for.

    Args:
        asked, given: as `require_applicable` has them.

    Raises:
        HubkitError: ``HK-HEAD`` where the base is not what is asked for; ``HK-OPTIONS``.
    """
    both = is_seq2seq(base)
    if task == SEQ2SEQ and not both:
        raise no_encoder(base)
    if task == CAUSAL_LM and both:
        what, want = "an encoder-decoder is no causal language model", "a decoder"
        raise HubkitError("HK-HEAD", what, where=str(base), want=want, fix=f"--task {SEQ2SEQ}")
    if task is None and both:
        require_applicable(SEQ2SEQ, asked, given)
        return SEQ2SEQ
    return None if task == CAUSAL_LM else task


def require_applicable(task: str | None, asked: Asked, given: Mapping[str, Any]) -> None:
    """Refuses arguments that do not go together with a task, or without one: ``HK-OPTIONS``.

    Args:
        asked: of the rows.
        given: arguments and options as they were given, by name.
    """
    if task in (None, CAUSAL_LM):
        said = {"--label": asked.label, "--text-pair": asked.pair, "--labels": ",".join(asked.labels)}
        if have := [f"{option} {value}" for option, value in said.items() if value]:
            what, fix = f"{have[0].split()[0][2:]} belongs to a task", f"--task {Classification.kind}"
            raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)
        return
    if task not in KINDS:
        want = f"one of {', '.join(TASKS)}"
        raise HubkitError("HK-OPTIONS", "task is no choice", want=want, have=repr(task), status=USAGE)
    have = [option for name, option in FOREIGN.items() if given.get(name)]
    have += ["--text-pair"] * bool(asked.pair and task not in (Classification.kind, Embedding.kind))
    if task in (Embedding.kind, Seq2Seq.kind):
        have += ["--label"] * bool(asked.label) + ["--labels"] * bool(asked.labels)
    if have:
        what, fix = f"these do not apply to the task {task}", f"leave out {', '.join(have)}"
        raise HubkitError("HK-OPTIONS", what, have=have, fix=fix, status=USAGE)
