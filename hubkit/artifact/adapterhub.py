"""AdapterHub's folders as data, read in both directions: how that library writes a method that hubkit has, too.

A folder is ``adapter_config.json`` (no ``peft_type``; the method's options under ``config``) and
``adapter.safetensors`` or ``pytorch_adapter.bin``. Every tensor is called
``<layer>.<place>.<adapter's name>.<role>``; the places of an architecture are data in ``tensors/arch.json``.

Format: https://docs.adapterhub.ml/loading.html, written by adapters 1.3.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hubkit.errors import HubkitError

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD_WEIGHTS, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
FILES = (CONFIG, WEIGHTS, PICKLE, HEAD_CONFIG, HEAD_WEIGHTS, HEAD_PICKLE)
"""The files of an adapter and of the prediction head beside it."""
VERSION = "adapters.1.3.0"


@dataclass(frozen=True)
class AdapterHubForm:
    """How AdapterHub spells one method.

    Args:
        roles: role -> end of the tensor's key.
        options: key of its ``config`` -> field of the method's configuration.
        values: key of `options` -> its value there -> ours; of several with one meaning the first is written.
        variants: field -> its value -> what all of these keys are then.
        width: (key of the factor by which the hidden size is divided, field of that factor, field of the width itself,
            role whose rows are that width): the tensors say which it is.
        layers: (key that lists the layers left out, field that lists those taken): the tensors say which.
        defaults: what the library takes for an absent key.
        allowed: further keys and the values under which the mathematics stays ours; the first value is written.
        ignored: keys without influence on what a trained adapter computes.
        architecture: the value of ``architecture`` in its ``config``; None where there is none.
    """

    roles: Mapping[str, str]
    options: Mapping[str, str]
    values: Mapping[str, Mapping[Any, Any]]
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]]
    width: tuple[str, str, str, str]
    layers: tuple[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    allowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    architecture: str | None = None


def is_adapterhub(data: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is AdapterHub's; PEFT's has a ``peft_type`` and no ``config``."""
    return "peft_type" not in data and "config" in data


def from_adapterhub_config(form: AdapterHubForm, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The method's configuration (JSON values) that `data` describes, but for what only the tensors say.

    Raises:
        HubkitError: ``HK-OPTION`` naming every active option that would change the mathematics and is not known here.
    """
    given = {**form.defaults, **data["config"]}
    config: dict[str, Any] = {}
    foreign: list[str] = []
    for ours, choices in form.variants.items():
        fitting = [name for name, want in choices.items() if all(given.get(k) == v for k, v in want.items())]
        if fitting:
            config[ours] = fitting[0]
        else:
            keys = sorted({key for want in choices.values() for key in want})
            foreign.append(f"{ours}: {', '.join(f'{key}={_json(given.get(key))}' for key in keys)}")
    decided = {key for choices in form.variants.values() for want in choices.values() for key in want}
    silent = decided | form.ignored | {form.width[0], form.layers[0], "architecture"}
    for key, value in sorted(given.items()):
        if key in form.options:
            known = form.values.get(key)
            if known is None:
                config[form.options[key]] = value
            elif isinstance(value, str) and value.lower() in known:
                config[form.options[key]] = known[value.lower()]
            else:
                foreign.append(f"{key}: {_json(value)}")
        elif key not in silent and not (value in form.allowed[key] if key in form.allowed else _off(value)):
            foreign.append(f"{key}: {_json(value)}")
    if not isinstance(data.get("version"), str):
        foreign.append("version: none, so the meaning of its options is not known")
    if foreign:
        raise HubkitError(
            "HK-OPTION",
            "the adapter uses options that are not supported: loading it without them would compute something else",
            where=f"{where}#/config",
            have=foreign,
            fix="train it again without these options",
        )
    return config


def to_adapterhub_config(
    form: AdapterHubForm,
    config: Mapping[str, Any],
    *,
    name: str,
    model_type: str,
    model_class: str,
    base_source: str | None,
    hidden: int,
    width: int,
    left_out: Iterable[int],
) -> bytes:
    """The bytes of ``adapter_config.json``: indented by 2, keys sorted.

    Args:
        config: the method's configuration as JSON values.
        name: the adapter's, as in its tensors' keys.
        width: of the bottleneck.
        left_out: numbers of the layers without an adapter.

    Raises:
        HubkitError: ``HK-EXPORT`` for a value that AdapterHub has no word for.
    """
    options = {key: values[0] for key, values in form.allowed.items()}
    for key, ours in form.options.items():
        value, words = config[ours], form.values.get(key)
        options[key] = value if words is None else next((theirs for theirs, w in words.items() if w == value), None)
        if options[key] is None:
            raise HubkitError("HK-EXPORT", f"AdapterHub has no {ours} {value!r}", want=", ".join(words or ()))
    for ours, choices in form.variants.items():
        options |= choices[config[ours]]
    options[form.width[0]] = _factor(hidden, width)
    options[form.layers[0]] = sorted(left_out)
    if form.architecture is not None:
        options["architecture"] = form.architecture
    document = {
        "config": options,
        "hidden_size": hidden,
        "model_class": model_class,
        "model_name": base_source or "",
        "model_type": model_type,
        "name": name,
        "version": VERSION,
    }
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _factor(hidden: int, width: int) -> int | float:
    """A reduction factor with ``int(hidden // factor) == width``, as the library divides."""
    return hidden // width if hidden % width == 0 else hidden / (width + 0.5)


def place_keys(
    form: AdapterHubForm, keys: Iterable[str], name: str, places: Mapping[str, str], where: str
) -> dict[tuple[str, str], str]:
    """(site, role) -> key, of the tensors of a file.

    Args:
        name: the adapter's name in the keys.
        places: where an adapter can be (``model.layers.0.output_adapters.adapters``) -> the site there. Files of a
            model without its head leave the first component out.

    Raises:
        HubkitError: ``HK-KEYS`` listing every tensor that has no meaning in this form.
    """
    ends = {end: role for role, end in form.roles.items()}
    sites = {place.partition(".")[2]: site for place, site in places.items()} | dict(places)
    found: dict[tuple[str, str], str] = {}
    unknown: list[str] = []
    for key in sorted(keys):
        place, _, end = key.partition(f".{name}.")
        at = (sites.get(place, ""), ends.get(end, ""))
        if all(at) and at not in found:
            found[at] = key
        else:
            unknown.append(key)
    if unknown or not found:
        raise HubkitError(
            "HK-KEYS",
            f"{len(unknown)} tensors have no meaning in this kind of adapter" if unknown else "no tensors",
            where=where,
            want=f"<layer>.<place>.{name}.<{' or '.join(sorted(ends))}>",
            have=unknown,
            fix="--base with the base that the adapter was trained on",
        )
    return found


def _off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
