"""Plans of mixes, rows of one batch under different ones included: every kind of part acts on its own rows alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.decoder import RELATIVE, embedding_table
from hubkit.tensors.base.site import Site
from hubkit.tensors.experts.expert import is_expert
from hubkit.tensors.front.plan import RowsVirtual, VirtualPlan, plan_virtual
from hubkit.tensors.live.plan import Actions, At, Plan, actions_of, grouped, plan_alike
from hubkit.tensors.lowrank.routed import RowGroup
from hubkit.tensors.lowrank.rows import Rows
from hubkit.tensors.parts import mix as mixes
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix
from hubkit.tensors.parts.vocabulary_plan import plan_vocabulary


def make_plan(mix: Mix | None, adapters: Mapping[str, Adapter], base: Base) -> Plan:
    """The plan of `mix`, None being the base alone.

    Args:
        adapters: those attached, by name.
        base: its sites.

    Raises:
        HubkitError: ``HK-UNKNOWN-ADAPTER``; ``HK-MIX``; ``HK-ROUTE`` for routes of different lengths in one mix, and
            for parts at sites that see no rows; ``HK-NOT-MERGEABLE`` for a member that reads the weight above one that
            has none to give.
    """
    if mix is None:
        return Plan()
    mixes.require_known(mix, adapters)
    of = mixes.by_row(mix)
    if of is None:
        return plan_alike(mix, adapters, base)
    different = list(dict.fromkeys(of))
    if len(different) == 1:
        plan = Plan() if different[0] is None else plan_alike(different[0], adapters, base)
        plan.rows = Rows([None] * len(of) if different[0] is None else [0] * len(of))
        return plan
    return _plan_rows([one for one in different if one is not None], of, adapters, base)


def _plan_rows(different: list[Mix], of: tuple[Mix | None, ...], adapters: Mapping[str, Adapter], base: Base) -> Plan:
    numbers: dict[Mix | None, int | None] = {None: None, **{one: number for number, one in enumerate(different)}}
    plan = Plan()
    plan.rows = rows = Rows([numbers[one] for one in of])
    if any(plan_vocabulary(one, adapters, base) is not None for one in different):
        raise HubkitError(
            "HK-ROUTE",
            "adapters with rows of single tokens cannot be routed: logits have one length for all rows",
            where=base.source,
            fix="the same mix for all rows, or one call for each mix",
        )
    actions = [actions_of(one, adapters, base) for one in different]
    _require_rows({site for own in actions for site in (*own.low, *own.other)}, base)
    low = [name for name in base.sites if any(name in own.low for own in actions)]
    groups = base.arch.groups(low)
    made: dict[tuple[str, ...], RowGroup] = {}
    for name in low:
        members = groups.get(name, (name,))
        if members not in made:
            here = {one: {k: own.low[one] for k, own in enumerate(actions) if one in own.low} for one in members}
            made[members] = RowGroup(here, rows)
        plan[name] = _grouped(made[members], name)
    for name in base.sites:
        acts = {k: own.other[name] for k, own in enumerate(actions) if name in own.other}
        if acts:
            plan[name] = _in_turn(plan.get(name), acts, rows)
    plan.virtual = _virtual(different, actions, adapters, base, rows)
    return plan


def _virtual(
    different: list[Mix], actions: list[Actions], adapters: Mapping[str, Adapter], base: Base, rows: Rows
) -> RowsVirtual | None:
    members: dict[int, tuple[VirtualPlan, Plan]] = {}
    for number, one in enumerate(different):
        virtual = plan_virtual(one, adapters)
        if virtual is not None:
            whole = grouped(actions[number], base) if virtual.runs else Plan()
            whole.virtual = virtual
            members[number] = virtual, whole
    if members and base.arch.encoder:
        raise HubkitError(
            "HK-ROUTE",
            "virtual tokens cannot be routed in an encoder: they run with the text of every row",
            where=base.source,
            fix="the same mix for all rows, or one call for each mix",
        )
    return RowsVirtual(members, rows) if members else None


def _require_rows(sites: set[str], base: Base) -> None:
    """Refuses sites whose module is not called with one row per row of the batch."""
    blind = [
        name
        for name, site in base.sites.items()
        if name in sites and (is_expert(name) or (site.kind == "embedding" and not _is_of_text(site, base)))
    ]
    if blind:
        raise HubkitError(
            "HK-ROUTE",
            "parts at these modules cannot be routed: they are not called with the rows of the batch",
            where=base.source,
            have=blind,
            fix="the same mix for all rows, or an adapter without them",
        )


def _is_of_text(site: Site, base: Base) -> bool:
    """Whether a table is as wide as that of the input tokens: positions are looked up once for all rows."""
    table = embedding_table(base.sites.values(), base.arch)
    return not site.name.endswith(RELATIVE) and (table is None or site.shape[0] == table.shape[0])


def _grouped(group: RowGroup, name: str) -> At:
    return lambda module, x, y: group.act(name, module, x, y)


def _in_turn(first: At | None, acts: Mapping[int, At], rows: Rows) -> At:
    """Mix by mix on its own rows, after what `first` does to others."""

    def act(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x, y = rows.spread(x, y)
        parts, order = rows.parted(y.shape[0], acts, y.device)
        if first is not None:
            y = first(module, x, y)
        made = [y[own] if mix is None else acts[mix](module, x[own], y[own]) for mix, own in parts]
        return torch.cat(made).index_select(0, order)

    return act
