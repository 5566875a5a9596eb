"""How several adapters act together: `Sum`, `Stack` and `Route`, nested as a tree, and what a tree adds to a weight.

sum    y + Σ wᵢ·partᵢ(x, y)            every member sees the base
stack  y ← y + w·part(x, y), in turn   every member sees what those before it made, weight included
route  row i of the batch: its own mix, or none
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from hubkit.documents.mix import Tree
from hubkit.errors import HubkitError, nearest
from hubkit.tensors.base.delta import Delta

if TYPE_CHECKING:
    from hubkit.tensors.base.site import Site

Members = Union[Mapping["Mix", float], Iterable[Union["Mix", "tuple[Mix, float]"]]]  # noqa: UP007 - forward references


@dataclass(frozen=True)
class _Node:
    members: tuple[tuple[Mix, float], ...]

    def __init__(self, members: Members) -> None:
        if isinstance(members, str) or not isinstance(members, Iterable):
            kind, want = type(self).__name__, "a mapping of names to weights, or a list of names and mixes"
            raise HubkitError("HK-MIX", f"these are no members of a {kind}", want=want, have=repr(members))
        pairs = members.items() if isinstance(members, Mapping) else members
        fixed = tuple(_pair(pair) for pair in pairs)
        if not fixed:
            raise HubkitError("HK-MIX", f"a {type(self).__name__.lower()} needs at least one member")
        for member, weight in fixed:
            if weight != weight or weight in (float("inf"), float("-inf")):
                raise HubkitError("HK-MIX", f"the weight of {member!r} is not a finite number", have=str(weight))
        object.__setattr__(self, "members", fixed)


def _pair(given: Any) -> tuple[Mix, float]:
    """A member with its weight, 1 where none is given."""
    member, weight = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
    try:
        if isinstance(member, str | Sum | Stack | Route):
            return member, float(weight)
    except (TypeError, ValueError):
        pass
    raise HubkitError("HK-MIX", "a member of a mix is a name or a mix, perhaps with a number", have=repr(given))


class Sum(_Node):
    """Weighted sum: ``Sum({"chat": 1.0, "sql": -0.5})``. Members may be mixes themselves."""


class Stack(_Node):
    """Each member on top of the one before: ``Stack(["domain", "task"])``; weighted: ``Stack([("a", 0.5), "b"])``."""


@dataclass(frozen=True)
class Route:
    """One mix per row of the batch: ``Route(["chat", None, Sum({"a": 0.5, "b": 0.5})])``; None: the base alone."""

    rows: tuple[Mix | None, ...]

    def __init__(self, rows: Iterable[Mix | None]) -> None:
        listed = tuple(rows) if isinstance(rows, Iterable) and not isinstance(rows, str) else (rows,)
        if not listed:
            raise HubkitError("HK-ROUTE", "a route needs an entry for every row of the batch", have="none")
        strange = [row for row in listed if not (row is None or isinstance(row, str | Sum | Stack | Route))]
        if strange:
            raise HubkitError(
                "HK-ROUTE", "an entry of a route is the name of an adapter, a mix or None", have=repr(strange[0])
            )
        object.__setattr__(self, "rows", listed)


Mix = str | Sum | Stack | Route


def by_row(mix: Mix) -> tuple[Mix | None, ...] | None:
    """The tree of each row, without a route in it; None where the tree has no route and all rows are alike.

    Raises:
        HubkitError: ``HK-ROUTE`` for routes of different lengths in one tree.
    """
    lengths = sorted(set(_lengths(mix)))
    if not lengths:
        return None
    if len(lengths) > 1:
        raise HubkitError("HK-ROUTE", "one mix holds routes of different lengths", have=", ".join(map(str, lengths)))
    return tuple(_of_row(mix, row) for row in range(lengths[0]))


def _lengths(mix: Mix | None) -> Iterator[int]:
    if isinstance(mix, Route):
        yield len(mix.rows)
    for child in _children(mix):
        yield from _lengths(child)


def _children(mix: Mix | None) -> Iterable[Mix | None]:
    if isinstance(mix, Route):
        return mix.rows
    return [member for member, _ in mix.members] if isinstance(mix, _Node) else ()


def _of_row(mix: Mix | None, row: int) -> Mix | None:
    if isinstance(mix, Route):
        return _of_row(mix.rows[row], row)
    if mix is None or isinstance(mix, str):
        return mix
    made = [(_of_row(member, row), weight) for member, weight in mix.members]
    kept = [(member, weight) for member, weight in made if member is not None]
    return type(mix)(kept) if kept else None


def names(mix: Mix | None) -> list[str]:
    """The adapters in a tree, each once, in order of appearance."""
    return list(dict.fromkeys(name for name, _ in leaves(mix)))


def leaves(mix: Mix | None, weight: float = 1.0) -> Iterator[tuple[str, float]]:
    """(adapter, product of the weights above it) for every leaf: the whole truth when no part reads y or the weight."""
    if isinstance(mix, str):
        yield mix, weight
    elif isinstance(mix, Route):
        for row in mix.rows:
            yield from leaves(row, weight)
    elif mix is not None:
        for member, factor in mix.members:
            yield from leaves(member, weight * factor)


def require_known(mix: Mix, known: Iterable[str]) -> None:
    """Raises ``HK-UNKNOWN-ADAPTER`` when the tree names an adapter that is not in `known`, ``HK-MIX`` for no tree."""
    if not isinstance(mix, str | Sum | Stack | Route):
        raise HubkitError("HK-MIX", "this is no mix", want="a name, Sum, Stack or Route", have=repr(mix))
    have = sorted(known)
    for name in names(mix):
        if name not in have:
            raise HubkitError(
                "HK-UNKNOWN-ADAPTER",
                f"no adapter {name!r} is attached",
                want=", ".join(have) or "(none attached)",
                have=name,
                fix=f"near: {', '.join(near)}" if (near := nearest(name, have)) else "attach it first",
            )


def delta(mix: Mix, site: Site, of: Callable[[str, Site], Delta | None]) -> Delta | None:
    """What the tree adds to the weight and bias of `site`; None when it does not touch it.

    Args:
        of: gives one adapter's delta at a site, whose weight may already carry the members below.

    Raises:
        HubkitError: ``HK-MIX`` for a route.
    """
    if isinstance(mix, str):
        return of(mix, site)
    if isinstance(mix, Route):
        raise HubkitError("HK-MIX", "a route has no weight of its own: it says which row gets which mix")
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
    if isinstance(mix, Route):
        return {"route": [None if row is None else to_document(row) for row in mix.rows]}
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
