"""Trees of sums and stacks as people type them: ``stack(./domain, 0.5*sum(./a, -1*./b)) + org/c``."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hubkit.documents.mix import DEEPEST, NodeKind, Tree, require_small, too_large
from hubkit.errors import HubkitError
from hubkit.named.terms import Terms, not_terms, parse_terms

if TYPE_CHECKING:
    from hubkit.tensors.parts.mix import Mix

_GROUP = re.compile(r"(?:(?<![\w./:@])(sum|stack)\s*)?\(")
_PARENTHESES = re.compile(r"[()]")
WHERE = "the terms of the mix"


def parse_tree(terms: Terms | Mix, kind: NodeKind) -> Tree:
    """The tree that `terms` describe, with references as names.

    Args:
        terms: what `parse_terms` takes; text in which ``sum(...)`` and ``stack(...)``, with terms between commas,
            stand for references; or a `Sum` or `Stack` of references.
        kind: how the outermost terms act together, where they are not one sum or stack themselves.

    Raises:
        HubkitError: ``HK-TERMS`` for text that is no such tree, ``HK-MIX`` for one beyond the limits.
    """
    if isinstance(terms, Mapping | os.PathLike):
        found: Tree | str = _flat(terms, kind)
    elif isinstance(terms, Sequence):
        text = terms if isinstance(terms, str) else " ".join(map(str, terms))
        found = _node(text, kind, 0) if _PARENTHESES.search(text) else _flat(terms, kind)
    else:
        found = _of(terms, 0)
    tree = Tree(kind, ((found, 1.0),)) if isinstance(found, str) else found
    require_small(tree, WHERE)
    return tree


def _flat(terms: Terms, kind: NodeKind) -> Tree:
    return Tree(kind, tuple(parse_terms(terms)))


def _node(text: str, kind: NodeKind, depth: int) -> Tree | str:
    """The terms in `text`, groups taken out first and put back afterwards; one alone of weight 1 is itself."""
    if depth > DEEPEST:
        raise too_large(WHERE, f"more than {DEEPEST} levels")
    groups: list[tuple[NodeKind, str]] = []
    rest, start = "", 0
    while (match := _GROUP.search(text, start)) is not None:
        end = _closing(text, match.end())
        rest += f"{text[start : match.start()]}({len(groups)})"
        groups.append(("stack" if match[1] == "stack" else "sum", text[match.end() : end]))
        start = end + 1
    names = {f"({number})": group for number, group in enumerate(groups)}
    members: list[tuple[Tree | str, float]] = []
    for name, weight in parse_terms(rest + text[start:]):
        if name not in names and re.search(r"[(),]", name):
            raise not_terms([name])
        members.append((_group(*names[name], depth + 1) if name in names else name, weight))
    return members[0][0] if len(members) == 1 and members[0][1] == 1.0 else Tree(kind, tuple(members))


def _group(kind: NodeKind, inside: str, depth: int) -> Tree:
    """``a, 0.5*b, sum(c, d)``: one member of the node per comma; a member may be a sum by itself, ``a + b``."""
    members: list[tuple[Tree | str, float]] = []
    for piece in _split(inside):
        found = _node(piece, "sum", depth)
        alone = isinstance(found, Tree) and len(found.members) == 1 and found.kind == "sum"
        members.append(found.members[0] if alone and isinstance(found, Tree) else (found, 1.0))
    only, weight = members[0]
    single = kind == "sum" and len(members) == 1 and weight == 1.0
    return only if single and isinstance(only, Tree) else Tree(kind, tuple(members))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that was opened before `start` is closed."""
    depth = 1
    for match in _PARENTHESES.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise not_terms(["a parenthesis that is not closed"])


def _split(text: str) -> list[str]:
    """The pieces between the commas that are in no parentheses."""
    depth, cuts = 0, [-1]
    for match in re.finditer(r"[(),]", text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if match[0] == "," and depth == 0:
            cuts.append(match.start())
    return [text[start + 1 : stop] for start, stop in itertools.pairwise([*cuts, len(text)])]


def _of(mix: Any, depth: int) -> Tree | str:
    """A `Sum` or `Stack` of references as a tree."""
    from hubkit.tensors.parts.mix import Stack, Sum

    if isinstance(mix, str):
        return mix
    if depth >= DEEPEST:
        raise too_large(WHERE, f"more than {DEEPEST} levels")
    if not isinstance(mix, Sum | Stack):
        what, want = "only sums and stacks can be written", "Sum, Stack or terms"
        raise HubkitError("HK-MIX", what, want=want, have=type(mix).__name__)
    kind: NodeKind = "stack" if isinstance(mix, Stack) else "sum"
    return Tree(kind, tuple((_of(member, depth + 1), weight) for member, weight in mix.members))
