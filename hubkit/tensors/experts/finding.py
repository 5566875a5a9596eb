"""The experts of a live model, by the names of its files."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from torch import nn

from hubkit.compat.transformers_names import fused_rows, whole_tensors
from hubkit.tensors.experts.expert import Expert, expert_names
from hubkit.tensors.experts.products import Products, multiplied

__all__ = ["expert_names", "experts_of", "multiplied", "whole_tensors"]


def experts_of(model: nn.Module, holds: Callable[[str], bool] | None = None) -> dict[str, Expert]:
    """Name of a site -> the expert of a live model that it is.

    Left out is what is computed in a way that `Products` does not know.

    Args:
        holds: says which tensors of the files hold the matrices of all experts; None: those are left out.
    """
    found: dict[nn.Module, dict[str, Expert]] = {}
    holders: dict[str, nn.Module] = {}
    for name, (path, number, rows) in fused_rows(model).items():
        place, _, tensor = path.rpartition(".")
        if place not in holders:
            holders[place] = model.get_submodule(place)
        holder, site = holders[place], name.removesuffix(".weight")
        if site != name:
            found.setdefault(holder, {})[site] = Expert(holder, tensor, number, rows, name)
    works: dict[Hashable, bool] = {}  # layers of one class and sizes are tried once
    known: dict[nn.Module, dict[str, Expert]] = {}
    for holder, experts in found.items():
        kind = _kind(holder, experts.values())
        if kind not in works:
            works[kind] = Products(holder, experts.values()).works()
        if works[kind]:
            known[holder] = experts
    whole: dict[nn.Module, dict[str, str]] = {}
    for name, path in whole_tensors(model).items() if holds is not None else ():
        place, _, tensor = path.rpartition(".")
        if holds is not None and holds(name):
            whole.setdefault(model.get_submodule(place), {})[tensor] = name
    for holder, stored in whole.items():
        for tensor, turned in (multiplied(holder, stored) or {}).items():
            known.setdefault(holder, {}).update(_whole(holder, tensor, stored[tensor], turned))
    return {name: expert for experts in known.values() for name, expert in experts.items()}


def _kind(holder: nn.Module, experts: Iterable[Expert]) -> Hashable:
    """What decides how a module of experts computes: class, settings, its tensors' shapes, and whose rows are whose."""
    settings = ((name, value) for name, value in vars(holder).items() if isinstance(value, (int, float, str)))
    shapes = ((name, tuple(value.shape)) for name, value in holder.named_parameters(recurse=False))
    rows = ((one.tensor, one.number, one.rows.start, one.rows.stop) for one in experts)
    return type(holder), (*settings,), (*shapes,), (*rows,)


def _whole(holder: nn.Module, tensor: str, stored: str, turned: bool) -> dict[str, Expert]:
    """The experts of a parameter that the files hold as it is."""
    count, *matrix = holder.get_parameter(tensor).shape
    rows = slice(0, matrix[1 if turned else 0])
    names = enumerate(expert_names(stored, count))
    return {name: Expert(holder, tensor, number, rows, stored, True, turned) for number, name in names}
