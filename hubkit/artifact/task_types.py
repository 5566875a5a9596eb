"""What PEFT and transformers call the tasks that hubkit trains, and what a reader of PEFT's form is told of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LABELS_NAME = "labels.json"
"""Beside PEFT's files: the names of the labels, as ``config.json`` of transformers has them."""


@dataclass(frozen=True)
class TaskType:
    """One task in the words of others.

    Args:
        peft: PEFT's ``task_type``.
        loader: the class of transformers that makes its model.
        heads: last names of the modules that PEFT takes for its head, whatever a configuration names.
        ending: how the names of the classes of transformers end; empty where the class is no sign of the task.
    """

    peft: str
    loader: str
    heads: tuple[str, ...] = ()
    ending: str = ""


TASK_TYPES: Mapping[str, TaskType] = {
    "classification": TaskType(
        "SEQ_CLS", "AutoModelForSequenceClassification", ("classifier", "score"), "ForSequenceClassification"
    ),
    "token-classification": TaskType(
        "TOKEN_CLS", "AutoModelForTokenClassification", ("classifier", "score"), "ForTokenClassification"
    ),
    "seq2seq": TaskType("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    "embedding": TaskType("FEATURE_EXTRACTION", "AutoModel"),
}
"""Kind of a task, as manifests name it -> what others call it."""


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The kind of task with a head for labels that PEFT's configuration is of; None for every other.

    PEFT names the task, or, where it was not told one, the class that it found.
    """
    mapping = config.get("auto_mapping")
    found = str(mapping.get("base_model_class")) if isinstance(mapping, Mapping) else ""
    for kind, one in TASK_TYPES.items():
        if one.heads and (config.get("task_type") == one.peft or (one.ending and found.endswith(one.ending))):
            return kind
    return None


def loader_of(task: Mapping[str, Any]) -> str:
    """The class of transformers that makes the model of an adapter with this ``task`` in its manifest, or without."""
    known = TASK_TYPES.get(str(task.get("kind")))
    return known.loader if known else "AutoModelForCausalLM"


def loading_options(task: Mapping[str, Any]) -> list[str]:
    """What that class is told so that its head is the adapter's."""
    labels, pad = task.get("labels"), task.get("pad")
    return [*([f"num_labels={len(labels)}"] if labels else []), *([f"pad_token_id={pad}"] if pad is not None else [])]


def labels_file(labels: list[str]) -> bytes:
    """``labels.json``."""
    document = {
        "id2label": {str(n): label for n, label in enumerate(labels)},
        "label2id": {label: n for n, label in enumerate(labels)},
    }
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def peft_card(name: str, task: Mapping[str, Any], base: str | None) -> bytes:
    """``README.md`` beside PEFT's files: which model the adapter is put on, and what its outputs mean.

    Args:
        name: the adapter's.
        task: of its manifest, with ``labels``.
        base: repository of the base.
    """
    labels, loader = list(map(str, task["labels"])), loader_of(task)
    lines = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "---", "", f"# {name}", ""]
    lines += [f"An adapter of PEFT with a head for {task['kind']}. The outputs of the head, in order:", ""]
    lines += [f"{n}. `{label}`".replace("\n", " ") for n, label in enumerate(labels)]
    options = [*loading_options(task), "id2label=id2label"]
    lines += [
        *("", "```python", "import json", "", "from peft import PeftModel", f"from transformers import {loader}", ""),
        f'named = json.load(open("{LABELS_NAME}"))["id2label"]',
        "id2label = {int(n): label for n, label in named.items()}",
        f'base = {loader}.from_pretrained("{base or "BASE"}", {", ".join(options)})',
        *('model = PeftModel.from_pretrained(base, ".").eval()', "```", ""),
    ]
    return "\n".join(lines).encode()
