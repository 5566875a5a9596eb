"""What a mix does, worked out before the first forward: site -> what happens to its output, and what stands in front.

A plan is never changed: a forward that has one keeps it to its end, whatever is set, swapped or removed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.front.plan import Virtual, plan_virtual
from hubkit.tensors.lowrank.group import Group, SiteParts, add_low_rank, owns_output
from hubkit.tensors.lowrank.rows import Rows
from hubkit.tensors.parts import mix as mixes
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix, Route, Stack, Sum
from hubkit.tensors.parts.part import Edit, LowRank
from hubkit.tensors.parts.vocabulary_plan import VocabularyPlan, plan_vocabulary

At = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, its input, its output) -> the new output."""


class Plan(dict[str, At]):
    """What one mix does: site -> what is done to its output.

    Attributes:
        virtual: what is put in front of the text.
        vocabulary: what single rows of the embeddings and the head become.
        rows: where the mix holds a route: which row has which of its mixes.
    """

    virtual: Virtual | None = None
    vocabulary: VocabularyPlan | None = None
    rows: Rows | None = None


@dataclass(frozen=True)
class Actions:
    """What one mix does at each site, before sites that share an input are grouped.

    Args:
        low: sites where low-rank parts alone act.
        other: all other sites that anything acts at.
    """

    low: Mapping[str, SiteParts]
    other: Mapping[str, At]


def plan_alike(mix: Mix, adapters: Mapping[str, Adapter], base: Base) -> Plan:
    """The plan of a mix without a route: all rows are alike.

    Args:
        adapters: those attached, by name; they hold all that the mix names.
        base: its sites.

    Raises:
        HubkitError: ``HK-MIX``, ``HK-NOT-MERGEABLE`` for a member that reads the weight above one that has none to
            give.
    """
    plan = grouped(actions_of(mix, adapters, base), base)
    plan.virtual = plan_virtual(mix, adapters)
    plan.vocabulary = plan_vocabulary(mix, adapters, base)
    return plan


def grouped(actions: Actions, base: Base) -> Plan:
    """The plan of `actions`, virtual tokens left out."""
    plan = Plan(actions.other)
    groups = base.arch.groups(actions.low)
    made: dict[tuple[str, ...], Group] = {}
    for site in actions.low:
        members = groups.get(site, (site,))
        group = made.setdefault(members, Group({name: actions.low[name] for name in members}))
        plan[site] = _adding(group, site)
    return plan


def actions_of(mix: Mix, adapters: Mapping[str, Adapter], base: Base) -> Actions:
    """What `mix` does at each site, in the base's order."""
    edits = {name: adapters[name].edits() for name in mixes.names(mix)}
    reached = {site for found in edits.values() for site in found}
    low: dict[str, SiteParts] = {}
    other: dict[str, At] = {}
    for name in [name for name in base.sites if name in reached]:
        here = [(edits[member][name], weight) for member, weight in mixes.leaves(mix) if name in edits[member]]
        rank_parts = [(part, weight) for part, weight in here if isinstance(part, LowRank)]
        if len(here) == 1 and not rank_parts and here[0][1] == 1.0:
            other[name] = _acting(here[0][0], base.sites[name])
        elif len(rank_parts) == len(here):
            low[name] = SiteParts([pair for pair in rank_parts if pair[1] != 0.0] or rank_parts)
        else:
            other[name] = _fold(mix, adapters, base.sites[name])
    return Actions(low, other)


def _fold(mix: Mix, adapters: Mapping[str, Adapter], site: Site) -> At:
    """The general rule, for parts that read the output or the weight."""
    parts = {name: part for name in mixes.names(mix) if (part := adapters[name].parts.get(site.name)) is not None}
    members = {name: adapters[name] for name in mixes.names(mix)}
    _require_mergeable_below(mix, parts, members, site)

    def increment(node: Mix, x: Tensor, y: Tensor, at: Site) -> Tensor:
        if isinstance(node, str):
            part = parts.get(node)
            return part(x, y, at) if isinstance(part, Edit) else torch.zeros_like(y)
        assert not isinstance(node, Route), "rows are told apart before"
        if isinstance(node, Sum):
            return torch.stack([w * increment(child, x, y, at) for child, w in node.members]).sum(0)
        start = y
        for index, (child, weight) in enumerate(node.members):
            y = y + weight * increment(child, x, y, at)
            rest = [c for c, _ in node.members[index + 1 :]]
            reads = _reads_weight(rest, parts)
            change = mixes.delta(child, at, _delta_of(members, torch.is_grad_enabled())) if reads else None
            at = at if change is None else at.after(change.scaled(weight))
        return y - start

    return lambda module, x, y: y + increment(mix, x, y, site).to(y.dtype)


def _reads_weight(nodes: list[Mix], parts: Mapping[str, nn.Module]) -> bool:
    found = (parts.get(name) for node in nodes for name in mixes.names(node))
    return any(isinstance(part, Edit) and part.reads_weight for part in found)


def _require_mergeable_below(
    node: Mix, parts: Mapping[str, nn.Module], adapters: Mapping[str, Adapter], site: Site
) -> None:
    """A member that reads the weight cannot stand above one that has none to give: refused when the mix is set."""
    if isinstance(node, str | Route):
        return
    for index, (child, _) in enumerate(node.members):
        _require_mergeable_below(child, parts, adapters, site)
        above = [c for c, _ in node.members[index + 1 :]]
        if isinstance(node, Stack) and _reads_weight(above, parts):
            mixes.delta(child, site, _delta_of(adapters))


def _adding(group: Group, site: str) -> At:
    parts = group.sites[site]

    def act(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the name of the site would make each layer another program
            return parts.plainly(x, y)
        return add_low_rank(group, site, module, x, y)

    return act


def _acting(part: Edit, site: Site) -> At:
    def act(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return Edit.act(part, x, y, site, False)
        return part.act(x, y, site, owns_output(module, y))

    return act


def _delta_of(adapters: Mapping[str, Adapter], grad: bool = False) -> Callable[[str, Site], Any]:
    return lambda name, site: adapters[name].delta(site, grad=grad)
