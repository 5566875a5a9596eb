"""How few layers of a base say what all of them keep: its layers by kind, and shorter models of the same kinds."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Hashable, Sequence
from typing import Any

from torch import nn

SHORT = (2, 4)
"""Layers of the two models of a base whose layers are all alike."""


def depth_of(model: nn.Module) -> int | None:
    """How many layers the base's configuration states; None where it states none."""
    stated = getattr(model, "config", None)
    found = None if stated is None else getattr(stated.get_text_config(), "num_hidden_layers", None)
    return found if isinstance(found, int) else None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the language model, in order; none where they lie in no list of as many as stated.

    Of several such lists (a model that sees has another tower) it is the one that holds most.
    """
    lists = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth_of(model)
    ]
    return list(max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=()))


def kinds_of(model: nn.Module, sites: Collection[str]) -> list[Hashable]:
    """What tells the layers of a base apart: their modules and shapes, what the configuration says, what is trained.

    Args:
        sites: names of those at which something is trained.
    """
    layers, text = layers_of(model), model.config.get_text_config()  # type: ignore[union-attr, operator]
    trained: list[list[str]] = [[] for _ in layers]
    for name in sorted(sites):
        steps = name.split(".")
        number = next((place for place, step in enumerate(steps) if step.isdigit()), None)
        if number is not None and int(steps[number]) < len(layers):
            trained[int(steps[number])].append(".".join(steps[number + 1 :]))
    said = list(_lists(text, len(layers)).values())
    return [
        (_shape(layer), tuple(repr(value[n]) for value in said), tuple(trained[n])) for n, layer in enumerate(layers)
    ]


def _shape(layer: nn.Module) -> Hashable:
    modules = ((name, type(module).__name__) for name, module in layer.named_modules())
    return (*modules, *((name, tuple(p.shape)) for name, p in layer.named_parameters()))


def _lists(text: Any, count: int) -> dict[str, list[Any]]:
    """What a configuration says of each layer."""
    found: dict[str, list[Any]] = {}
    for name in sorted({*vars(text), "layer_types", "layers_block_type"}):
        with contextlib.suppress(Exception):  # some are worked out, and not in every configuration
            if isinstance(value := getattr(text, name.lstrip("_")), list) and len(value) == count:
                found[name.lstrip("_")] = value
    return found


def depths(kinds: Sequence[Hashable]) -> tuple[int, int] | None:
    """Layers of two models; from the shorter on, the base goes on as the longer one does. None: as many as it has.

    The kinds of layers repeat, after the first few. The longer model has one such period more.
    """
    whole = len(kinds)
    for period in range(1, whole // 2 + 1):
        alike = [one == other for one, other in zip(kinds, kinds[period:], strict=False)]
        first = len(alike) - alike[::-1].index(False) if False in alike else 0  # from here on they repeat
        first += (whole - first) % period
        short, long = SHORT if (first, period) == (0, 1) else (first + period, first + 2 * period)
        if long < whole and 2 * first <= whole:
            return short, long
    return None


def shortened(model: nn.Module, layers: int | None, vocabulary: int | None = None) -> Any:
    """The configuration of the base with fewer layers, and fewer words; as they are for None."""
    config: Any = copy.deepcopy(model.config)
    text, whole = config.get_text_config(), depth_of(model)
    for name in () if vocabulary is None else ("vocab_size", "pad_token_id"):
        if isinstance(number := getattr(text, name, None), int) and number >= (vocabulary or 0):
            setattr(text, name, vocabulary if name == "vocab_size" else 0)
    if layers is None:
        return config
    kept = _lists(text, whole or 0)
    text.num_hidden_layers = layers
    for name, value in kept.items():
        with contextlib.suppress(AttributeError):  # worked out from the number of layers
            setattr(text, name, value[:layers])
    return config
