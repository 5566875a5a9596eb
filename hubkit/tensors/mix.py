"""How several adapters act together: `Sum` and `Stack`, nested as a tree, and what the tree adds to a weight.

sum    y + Σ wᵢ·partᵢ(x, y)            every member sees the base
stack  y ← y + w·part(x, y), in turn   every member sees what those before it made, weight included
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from hubkit.documents.mix import Tree
from hubkit.errors import HubkitError, nearest
from hubkit.tensors.delta import Delta

if TYPE_CHECKING:
    from hubkit.tensors.site import Site

Members = Union[Mapping["Mix", float], Iterable[Union["Mix", "tuple[Mix, float]"]]]  # noqa: UP007 - forward references


@dataclass(frozen=True)
class _Node:
    members: tuple[tuple[Mix, float], ...]

    def __init__(self, members: Members) -> None:
        pairs = members.items() if isinstance(members, Mapping) else members
        fixed = tuple((p[0], float(p[1])) if isinstance(p, tuple) else (p, 1.0) for p in pairs)
        if not fixed:
            raise HubkitError("HK-MIX", f"a {type(self).__name__.lower()} needs at least one member")
        for member, weight in fixed:
            if weight != weight or weight in (float("inf"), float("-inf")):
                raise HubkitError("HK-MIX", f"the weight of {member!r} is not a finite number", have=str(weight))
        object.__setattr__(self, "members", fixed)


class Sum(_Node):
    """Weighted sum: ``Sum({"chat": 1.0, "sql": -0.5})``. Members may be mixes themselves."""


class Stack(_Node):
    """Each member on top of the one before: ``Stack(["domain", "task"])``; weighted: ``Stack([("a", 0.5), "b"])``."""


Mix = str | Sum | Stack


def names(mix: Mix) -> list[str]:
    """The adapters in a tree, each once, in order of appearance."""
    return list(dict.fromkeys(name for name, _ in leaves(mix)))


def leaves(mix: Mix, weight: float = 1.0) -> Iterator[tuple[str, float]]:
    """(adapter, product of the weights above it) for every leaf: the whole truth when no part reads y or the weight."""
    if isinstance(mix, str):
        yield mix, weight
        return
    for member, factor in mix.members:
        yield from leaves(member, weight * factor)


def require_known(mix: Mix, known: Iterable[str]) -> None:
    """Raises ``HK-UNKNOWN-ADAPTER`` when the tree names an adapter that is not in `known`."""
    have = sorted(known)
    for name in names(mix):
        if name not in have:
            raise HubkitError(
                "HK-UNKNOWN-ADAPTER", f"no adapter {name!r} is attached", want=", ".join(have) or "(none attached)",
                have=name, fix=f"near: {', '.join(near)}" if (near := nearest(name, have)) else "attach it first",
            )  # fmt: skip


def delta(mix: Mix, site: Site, of: Callable[[str, Site], Delta | None]) -> Delta | None:
    """What the tree adds to the weight and bias of `site`; None when it does not touch it.

    Args:
        of: gives one adapter's delta at a site, whose weight may already carry the members below.
    """
    if isinstance(mix, str):
        return of(mix, site)
    total: Delta | None = None
    for member, weight in mix.members:
        change = delta(member, site, of)
        if change is None:
            continue
        change = change.scaled(weight)
        total = change if total is None else total.plus(change)
        if isinstance(mix, Stack):
            site = site.after(change)
    return total


def to_document(mix: Mix) -> dict[str, Any]:
    """The tree as JSON: ``{"sum": [{"adapter": "a", "weight": 1.0}, ...]}``."""
    if isinstance(mix, str):
        return {"adapter": mix}
    key = "sum" if isinstance(mix, Sum) else "stack"
    return {key: [{**to_document(member), "weight": weight} for member, weight in mix.members]}


def from_tree(tree: Tree | str) -> Mix:
    """The mix that a manifest's tree describes."""
    if isinstance(tree, str):
        return tree
    return make_mix(tree.kind, [(from_tree(member), weight) for member, weight in tree.members])


def make_mix(kind: str, weights: Mapping[str, float] | Sequence[tuple[Mix, float]]) -> Mix:
    """The mix of a recipe, lock or command: `kind` is ``sum`` or ``stack``, `weights` in order.

    Raises:
        HubkitError: ``HK-MIX`` for another kind.
    """
    if kind not in ("sum", "stack"):
        raise HubkitError("HK-MIX", f"unknown mix {kind!r}", want="sum or stack", have=kind)
    return Sum(weights) if kind == "sum" else Stack(weights)
