"""The tree of a mix, as a manifest of kind ``mix`` holds it: which adapters act together, in which order and weights.

::

    {"members": {"chat": {"digest": "sha256:...", "reference": "ana/chat@<commit>"}, "sql": {...}, "terse": {...}},
     "tree": {"stack": [{"adapter": "chat", "weight": 1},
                        {"sum": [{"adapter": "sql", "weight": 1}, {"adapter": "terse", "weight": -0.5}], "weight": 2}]}}

A member is known by the digest of its manifest, so that no mix can hold itself; its reference says where it was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hubkit.errors import HubkitError

DEEPEST = 16
"""Sums and stacks inside each other, those of mixes inside mixes included."""
MOST = 256
"""Places for adapters in one tree, those of mixes inside mixes included."""
NodeKind = Literal["sum", "stack"]
KINDS: tuple[NodeKind, ...] = ("sum", "stack")


@dataclass(frozen=True)
class Tree:
    """A sum or stack: (member, weight) in order. A member is a name, or a tree."""

    kind: NodeKind
    members: tuple[tuple[Tree | str, float], ...]

    def kinds(self) -> set[str]:
        """Which of sum and stack occur in it."""
        return {self.kind}.union(*(one.kinds() for one, _ in self.members if isinstance(one, Tree)))

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(term(member, weight) for member, weight in self.members)})"


@dataclass(frozen=True)
class MixMember:
    """An adapter or mix in a mix: where it was found, and the digest of its manifest, which it must have."""

    reference: str
    digest: str


@dataclass(frozen=True)
class MixDocument:
    """The field ``mix`` of a manifest of kind ``mix``.

    Args:
        members: name in the tree -> member.
        tree: how they act together.
    """

    members: Mapping[str, MixMember]
    tree: Tree

    def to_document(self) -> dict[str, Any]:
        """The JSON object that `read_mix` reads."""
        members = {name: {"reference": one.reference, "digest": one.digest} for name, one in self.members.items()}
        return {"members": members, "tree": _document(self.tree)}


def term(member: Tree | str, weight: float) -> str:
    """``-0.5*sql``, as people write it; a weight of 1 is left out."""
    return str(member) if weight == 1.0 else f"{weight:g}*{member}"


def leaves(tree: Tree | str, weight: float = 1.0) -> Iterator[tuple[str, float]]:
    """(name, product of the weights above it) of every place in a tree, in order."""
    if isinstance(tree, str):
        yield tree, weight
        return
    for member, factor in tree.members:
        yield from leaves(member, weight * factor)


def weights(tree: Tree) -> dict[str, float]:
    """Name -> the sum of its weights over all its places, in order of appearance."""
    found: dict[str, float] = {}
    for name, weight in leaves(tree):
        found[name] = found.get(name, 0.0) + weight
    return found


def replaced(tree: Tree, members: Mapping[str, Tree | str]) -> Tree:
    """The tree with every name exchanged for what `members` says of it."""
    changed = ((members[one] if isinstance(one, str) else replaced(one, members), w) for one, w in tree.members)
    return Tree(tree.kind, tuple(changed))


def require_small(tree: Tree, where: str) -> None:
    """Refuses a tree that is deeper than `DEEPEST` or has more than `MOST` places: ``HK-MIX``."""
    level: list[Tree | str] = [tree]
    depth, places = 0, 0
    while level:
        depth += any(isinstance(node, Tree) for node in level)
        places += sum(isinstance(node, str) for node in level)
        if depth > DEEPEST or places > MOST:
            have = f"more than {DEEPEST} levels" if depth > DEEPEST else f"more than {MOST} members"
            raise too_large(where, have)
        level = [member for node in level if isinstance(node, Tree) for member, _ in node.members]


def too_large(where: str, have: str) -> HubkitError:
    """The refusal of a tree that is too deep or too wide."""
    want = f"at most {DEEPEST} sums and stacks inside each other, and {MOST} members"
    fix = "write a part of it as one adapter: hubkit compose"
    return HubkitError("HK-MIX", "the mix is too large", where=where, want=want, have=have, fix=fix)


def read_mix(document: Mapping[str, Any], where: str) -> MixDocument:
    """Read the field ``mix`` of a manifest whose shape the schema has checked.

    Raises:
        HubkitError: ``HK-SCHEMA`` with every fault: a node that is not one of adapter, sum and stack; names without a
            member, members without a place; ``HK-MIX`` for a tree beyond the limits.
    """
    faults = list(_faults(document["tree"], "#/mix/tree"))
    if not faults:
        tree = _tree(document["tree"])
        require_small(tree, f"{where}#/mix")
        named, known = {name for name, _ in leaves(tree)}, document["members"].keys()
        faults += [f"#/mix/tree: {name!r} is no member" for name in sorted(named - known)]
        faults += [f"#/mix/members/{name}: it has no place in the tree" for name in sorted(known - named)]
    if faults:
        raise HubkitError("HK-SCHEMA", "the tree of the mix is not valid", where=where, have=faults[:200])
    members = {name: MixMember(one["reference"], one["digest"]) for name, one in document["members"].items()}
    return MixDocument(members, tree)


def require_bounded(mix: Any, where: str) -> None:
    """Refuses a document that is beyond the limits, before anything walks down it; its shape may be any: ``HK-MIX``."""
    if not isinstance(mix, Mapping):
        return
    members, level, places = mix.get("members"), [mix.get("tree")], 0
    if isinstance(members, Mapping) and len(members) > MOST:
        raise too_large(f"{where}#/mix", f"{len(members)} members")
    for _ in range(DEEPEST + 1):
        lists = [node.get(kind) for node in level if isinstance(node, Mapping) for kind in KINDS]
        level = [child for found in lists if isinstance(found, list) for child in found]
        places += len(level)
        if places > 2 * DEEPEST * MOST:
            raise too_large(f"{where}#/mix", f"more than {MOST} members")
        if not level:
            return
    raise too_large(f"{where}#/mix", f"more than {DEEPEST} levels")


def _faults(node: Mapping[str, Any], at: str) -> Iterator[str]:
    given = [key for key in ("adapter", *KINDS) if key in node]
    if len(given) != 1 or (at == "#/mix/tree" and given == ["adapter"]):
        yield f"{at}: {' and '.join(given) or 'nothing'}, not one of adapter, sum and stack"
    if not math.isfinite(_number(node.get("weight", 1))):
        yield f"{at}/weight: beyond the range of a number"
    for key in KINDS:
        for index, child in enumerate(node.get(key, ())):
            yield from _faults(child, f"{at}/{key}/{index}")


def _number(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _tree(node: Mapping[str, Any]) -> Tree:
    kind = next(key for key in KINDS if key in node)
    return Tree(kind, tuple((_member(child), float(child.get("weight", 1))) for child in node[kind]))


def _member(node: Mapping[str, Any]) -> Tree | str:
    return str(node["adapter"]) if "adapter" in node else _tree(node)


def _document(tree: Tree | str) -> dict[str, Any]:
    if isinstance(tree, str):
        return {"adapter": tree}
    return {tree.kind: [{**_document(member), "weight": weight} for member, weight in tree.members]}
