"""AdapterHub's prediction heads as data: which of them compute what a class of transformers computes.

A head is ``head_config.json`` and ``model_head.safetensors`` or ``pytorch_model_head.bin`` beside an adapter. That of a
class of transformers (``BertForSequenceClassification``) keeps that class's names. One of the library's own is a
sequence of dropout, linear layer and activation, its tensors ``heads.<name>.<number>.weight``; what goes in is the
first token's hidden state, the pooler's output, or, in a decoder, the last token's.

Format: https://docs.adapterhub.ml/prediction_heads.html, written by adapters 1.3.0, whose own ``head_utils.py`` says
which classes are which heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hubkit.artifact.adapterhub import VERSION
from hubkit.artifact.task_types import TASK_TYPES
from hubkit.errors import HubkitError

FIX = "hubkit pack --without-head packs the body alone"


@dataclass(frozen=True)
class HeadForm:
    """A head of AdapterHub that the class of a task computes as well.

    Args:
        kind: of the task.
        type: AdapterHub's ``head_type``.
        modules: the class's linear layers, in the order in which AdapterHub has them.
        activation: between them.
        bias: whether the last has one.
        pooled: whether the pooler of the base comes first.
    """

    kind: str
    type: str
    modules: tuple[str, ...]
    activation: str | None = None
    bias: bool = True
    pooled: bool = False

    @property
    def steps(self) -> list[int]:
        """The numbers of its linear layers: a dropout stands before each, an activation after all but the last."""
        return [1 + layer * (3 if self.activation else 2) for layer in range(len(self.modules))]

    def options(self, labels: list[str]) -> dict[str, Any]:
        """Its ``config`` as the library writes it."""
        found = {
            "activation_function": self.activation or "tanh",
            "dropout_prob": None,
            "head_type": self.type,
            "label2id": {label: n for n, label in enumerate(labels)},
            "layers": len(self.modules),
            "num_labels": len(labels),
        }
        return found if self.type == "tagging" else {**found, "bias": self.bias, "use_pooler": self.pooled}

    def __str__(self) -> str:
        bias = "" if self.bias else ", without a bias"
        pooled = ", on the pooler" if self.pooled else ""
        return f"{self.type}, {len(self.modules)} layers{pooled}{bias}" + (
            f", {self.activation}" * bool(self.activation)
        )


_CLASS, _TAGS = "classification", "token-classification"
_LAST = HeadForm(_CLASS, "classification", ("score",), bias=False)
FORMS: Mapping[str, tuple[HeadForm, ...]] = {
    "bert": (
        HeadForm(_CLASS, "classification", ("bert.pooler.dense", "classifier"), "tanh"),
        HeadForm(_CLASS, "classification", ("classifier",), pooled=True),
        HeadForm(_TAGS, "tagging", ("classifier",)),
    ),
    "roberta": (
        HeadForm(_CLASS, "classification", ("classifier.dense", "classifier.out_proj"), "tanh"),
        HeadForm(_TAGS, "tagging", ("classifier",)),
    ),
    "llama": (_LAST, HeadForm(_TAGS, "tagging", ("score",))),
    "mistral": (_LAST, HeadForm(_TAGS, "tagging", ("score",))),
    "gpt2": (_LAST, HeadForm(_TAGS, "tagging", ("classifier",))),
}
"""``model_type`` -> the heads that its classes have."""
CLASSES = {
    "bert": "BertAdapterModel",
    "roberta": "RobertaAdapterModel",
    "llama": "LlamaAdapterModel",
    "mistral": "MistralAdapterModel",
    "gpt2": "GPT2AdapterModel",
}
"""``model_type`` -> the class of the library that has heads of its own."""
_OPTIONS = {
    "activation_function",
    "bias",
    "dropout_prob",
    "head_type",
    "label2id",
    "layers",
    "num_labels",
    "use_pooler",
}


@dataclass(frozen=True)
class ReadHead:
    """What a head is.

    Args:
        kind: of its task; None for that of a language model.
        keys: name of a tensor in its file -> module and ``weight`` or ``bias``.
        labels: in the order of its outputs; None where nobody named them.
    """

    kind: str | None
    keys: Mapping[str, tuple[str, str]]
    labels: list[str] | None


def read_head(document: Mapping[str, Any], keys: Iterable[str], model_type: str, where: str) -> ReadHead:
    """What the head of an AdapterHub folder is, in the names of the base's class.

    Args:
        document: ``head_config.json``.
        keys: names of its tensors.
        model_type: of the base.
        where: the folder, for messages.

    Raises:
        HubkitError: ``HK-HEAD`` for one that no class of this base computes.
    """
    options, own = document.get("config"), str(document.get("model_class"))
    if not isinstance(options, Mapping):
        kind = next((k for k, one in TASK_TYPES.items() if one.ending and own.endswith(one.ending)), None)
        found = {key: (key.rpartition(".")[0], key.rpartition(".")[2]) for key in keys}
        return ReadHead(kind, found, _labels(document.get("label2id"), document.get("num_labels")))
    form = next((one for one in FORMS.get(model_type, ()) if _is(one, options)), None)
    strange = [f"{key}: {json.dumps(value)}" for key, value in sorted(options.items()) if key not in _OPTIONS and value]
    if form is None or strange:
        shown = ("head_type", "layers", "activation_function", "use_pooler", "bias")
        have = strange or [f"{key}: {json.dumps(options[key])}" for key in shown if key in options]
        raise no_such_head(model_type, have, where)
    places = {f"heads.{document.get('name')}.{step}": name for step, name in zip(form.steps, form.modules, strict=True)}
    split = {key: key.rpartition(".")[::2] for key in keys}
    unknown = [key for key, (place, _) in split.items() if place not in places]
    missing = [f"missing: {place}.weight" for place in places if f"{place}.weight" not in split]
    if unknown or missing:
        what = "the tensors of the head are not those that it says"
        raise HubkitError("HK-KEYS", what, where=where, want=sorted(places), have=[*unknown, *missing], fix=FIX)
    found = {key: (places[place], role) for key, (place, role) in split.items()}
    return ReadHead(form.kind, found, _labels(options.get("label2id"), options.get("num_labels")))


def no_such_head(model_type: str, have: list[str] | str, where: str) -> HubkitError:
    """``HK-HEAD``: what the adapter says cannot be said without its head."""
    return HubkitError(
        "HK-HEAD",
        "the adapter has a prediction head that no class of its base computes: without it, it says something else",
        where=where,
        want=[str(form) for form in FORMS.get(model_type, ())],
        have=have,
        fix=FIX,
    )


def head_config(
    form: HeadForm, labels: list[str], name: str, model_type: str, source: str | None, hidden: int
) -> bytes:
    """The bytes of ``head_config.json``: indented by 2, keys sorted.

    Args:
        name: the adapter's, as in its tensors' keys.
        source: repository of the base.
        hidden: width of what goes in.
    """
    document = {
        "config": form.options(labels),
        "hidden_size": hidden,
        "model_class": CLASSES[model_type],
        "model_name": source or "",
        "model_type": model_type,
        "name": name,
        "version": VERSION,
    }
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _is(form: HeadForm, options: Mapping[str, Any]) -> bool:
    layers = options.get("layers")
    activation = options.get("activation_function") if isinstance(layers, int) and layers > 1 else None
    have = (
        options.get("head_type"),
        layers,
        activation,
        bool(options.get("use_pooler")),
        bool(options.get("bias", True)),
    )
    return have == (form.type, len(form.modules), form.activation, form.pooled, form.bias)


def _labels(numbers: Any, count: Any) -> list[str] | None:
    """Labels in order; None where they are not one for each output."""
    given = numbers if isinstance(numbers, Mapping) else {}
    names = {str(number): str(label) for label, number in given.items()}
    found = [names.get(str(n)) for n in range(len(names))]
    return [str(name) for name in found] if found and None not in found and len(found) == count else None
