"""Names of tensors in a live model and in its files: transformers renames some while it loads, fuses and splits others.

The experts of a mixture lie one by one in the files and are one tensor in the model. Read from transformers 5.23:
``core_model_loading.revert_weight_conversion``, which saves a model under the names that it was loaded from; before 5,
from the class's ``_checkpoint_conversion_mapping``, as ``save_pretrained`` of 4.57 does.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def file_naming(model: nn.Module) -> Callable[[str], str | None]:
    """Gives the name in the files for the name of a tensor of `model`; None for one that is made of others."""
    conversions = _conversions(model)
    if conversions is None:
        patterns = _patterns(model)
        return lambda name: _renamed(name, patterns)
    from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_converters, apply_renamings

    reverse = [one.reverse_transform() for one in reversed(conversions)]
    renamings = [one for one in reverse if isinstance(one, WeightRenaming)]
    converters = [one for one in reverse if isinstance(one, WeightConverter)]

    def name_of(name: str) -> str | None:
        made = apply_converters(name, converters)[1]
        return apply_renamings(name, renamings) if made is None else None

    return name_of


def as_in_files(model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a live model as its files hold them: renamed, and taken apart where they were fused."""
    if _conversions(model) is None:
        naming = file_naming(model)
        return {str(naming(name)): tensor for name, tensor in state.items()}
    from transformers.core_model_loading import revert_weight_conversion

    found: Mapping[str, Tensor] = revert_weight_conversion(_Loaded(model), dict(state))
    return found


def fused_rows(model: nn.Module) -> dict[str, tuple[str, int, slice]]:
    """Which rows of which tensor of a live model are a tensor of the files: name there -> (name, number, rows).

    For tensors in which the model holds many matrices of the files, (count, rows, in): found by having transformers
    take tensors apart whose values are the numbers of their rows. Left out is what is taken apart in another way.
    """
    import torch

    from hubkit.compat.torch import on_cpu

    fused = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    naming = file_naming(model) if fused else str
    starts: dict[int, tuple[str, int]] = {}
    probes: dict[str, Tensor] = {}
    start = 0
    for name, parameter in fused.items():
        if naming(name) is None:
            count, size = parameter.shape[:2]
            starts[start] = name, size
            probes[name] = torch.arange(start, start + count * size, device="cpu").view(count, size, 1)
            start += count * size
    if not probes:
        return {}
    with on_cpu():  # wherever the model is being made
        parts = [one for one in as_in_files(model, probes).items() if len(one[1]) and one[1].shape[1:] == (1,)]
    found: dict[str, tuple[str, int, slice]] = {}
    edges = sorted(starts)
    for (own, tensor), first in zip(parts, _firsts([tensor for _, tensor in parts]), strict=True):
        if first is None:
            continue
        edge = edges[bisect_right(edges, first) - 1]
        name, size = starts[edge]
        number, row = divmod(first - edge, size)
        if row + len(tensor) <= size:
            found[own] = name, number, slice(row, row + len(tensor))
    return found


def _firsts(tensors: Sequence[Tensor]) -> Iterator[int | None]:
    """The first number of each tensor, (rows, 1), where the others follow it one by one; else None.

    Many are looked at together: a call of torch takes ten times as long as so few numbers.
    """
    import numpy
    import torch

    for at in range(0, len(tensors), 1024):
        some = tensors[at : at + 1024]
        numbers, sizes = torch.cat(list(some)).flatten().numpy(), numpy.array([len(one) for one in some])
        stops = sizes.cumsum()
        jumps = numpy.append(0, (numpy.diff(numbers) != 1).cumsum())
        in_order = jumps[stops - 1] == jumps[stops - sizes]
        firsts = zip(numbers[stops - sizes].tolist(), in_order.tolist(), strict=True)
        yield from (first if good else None for first, good in firsts)


def whole_tensors(model: nn.Module) -> dict[str, str]:
    """The tensors of three dimensions that a live model holds as its files do: name there -> name in the model."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]
    naming = file_naming(model) if names else str
    return {own: name for name in names if (own := naming(name)) is not None}


def may_be_missing(model: nn.Module) -> Sequence[str]:
    """Expressions for names of tensors that files may lack, as the class of `model` says: it makes them itself.

    ``_keys_to_ignore_on_load_missing``, in 4.57 as in 5.23; what loading reports leaves them out without a word.
    """
    return getattr(model, "_keys_to_ignore_on_load_missing", None) or ()


class _Loaded:
    """A model as transformers' saving sees it, whose conversions are those that can be reverted."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._weight_conversions = model, _conversions(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _conversions(model: nn.Module) -> list[Any] | None:
    """What transformers 5 did to the files' tensors when it loaded `model`, or does to those of its class.

    None where it has no such table: before 5, and for a model that is not of transformers.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange
    except ImportError:
        return None
    loaded: list[Any] | None = getattr(model, "_weight_conversions", None)
    if loaded is None and not hasattr(model, "base_model_prefix"):
        return None
    if loaded is not None and not any(map(_of_a_quantizer, loaded)):
        return loaded
    plain = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    if loaded is None:
        return plain
    # a quantizer changes the class's own conversions, to decode what they fuse: those stand for them
    own = {tuple(one.target_patterns): one for one in plain}
    found = (own.get(tuple(one.target_patterns)) if _of_a_quantizer(one) else one for one in loaded)
    return [one for one in found if one is not None]


def _of_a_quantizer(conversion: Any) -> bool:
    """Whether a conversion is a quantizer's, that makes layers of packed tensors: they keep the names of the files."""
    operations = getattr(conversion, "operations", ())
    return any(type(one).__module__.startswith("transformers.integrations") for one in operations)


def _patterns(model: nn.Module) -> Mapping[str, str]:
    """Expression for names of modules -> what takes its place in the files."""
    mapping: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    return {live: re.sub(r"\(.*\)", "", stored.lstrip("^")) for stored, live in mapping.items()}


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, stored in patterns.items():
        name, count = re.subn(pattern, stored, name)
        if count:
            break
    return name
