"""What a mix does to rows of single tokens: they add up like any change, and tables grow by the new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import accumulation_dtype
from hubkit.tensors.base.site import Site
from hubkit.tensors.base.token_sites import SUFFIX, table_size, token_table
from hubkit.tensors.device import indices
from hubkit.tensors.parts import mix as mixes
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix
from hubkit.tensors.parts.vocabulary import TokenRows, added_by, require_one_vocabulary


@dataclass(frozen=True)
class VocabularyPlan:
    """What one mix does to single rows.

    Args:
        members: name of a virtual site -> its parts, each with its weight.
        base: the base they act in.
        size: rows of the tables under this mix.
    """

    members: Mapping[str, Sequence[tuple[TokenRows, float]]]
    base: Base
    size: int

    def at(self, site: Site) -> Site | None:
        """The virtual site whose rows act at the table or head `site`; a tied head has its table's."""
        same = (virtual for name, virtual in self.base.rows.items() if name in self.members)
        return next((v for v in same if v.name == site.name + SUFFIX or (site.tied and v.tensor == site.tensor)), None)

    def change(self, virtual: Site) -> tuple[list[int], Tensor]:
        """Ids, sorted, and what is added to their rows, (n, hidden), accumulated wide."""
        members = self.members[virtual.name]
        ids = sorted({i for part, _ in members for i in part.ids})
        place, wide = {i: at for at, i in enumerate(ids)}, accumulation_dtype(virtual.dtype)
        old = table_size(virtual)[0]
        total = torch.zeros(len(ids), table_size(virtual)[1], dtype=wide, device=virtual.device)
        for part, weight in members:
            known = [at for at, i in enumerate(part.ids) if i < old]
            rows = part.rows.to(wide)
            if known:
                own = token_table(virtual).index_select(0, indices(tuple(part.ids[at] for at in known), rows.device))
                before = torch.zeros_like(rows).detach()
                rows = rows - before.index_copy_(0, indices(tuple(known), rows.device), own.to(wide))
            total = total.index_add(0, indices(tuple(place[i] for i in part.ids), rows.device), rows * weight)
        return ids, total

    def added(self, site: Site, rows: int) -> Tensor | None:
        """The rows of new tokens, (n, hidden), wide, below the `rows` of the table of `site`; None without any."""
        virtual = self.at(site)
        if virtual is None or self.size == rows:
            return None
        ids, change = self.change(virtual)
        return change[[at for at, i in enumerate(ids) if i >= rows]].detach()


def plan_vocabulary(mix: Mix, adapters: Mapping[str, Adapter], base: Base) -> VocabularyPlan | None:
    """What `mix` does to single rows of `base`; None where it has no such part.

    Raises:
        HubkitError: ``HK-VOCABULARY`` when members add different tokens: one id would mean two of them.
    """
    members: dict[str, list[tuple[TokenRows, float]]] = {}
    for name, weight in mixes.leaves(mix):
        for site, part in adapters[name].parts.items():
            if isinstance(part, TokenRows):
                members.setdefault(site, []).append((part, weight))
    if not members:
        return None
    used = {name: adapters[name] for name in mixes.names(mix)}
    require_one_vocabulary({name: added_by(adapter.parts.values()) for name, adapter in used.items()})
    ids = [i for parts in members.values() for part, _ in parts for i in part.ids]
    return VocabularyPlan(members, base, max(table_size(base.rows[next(iter(members))])[0], *(i + 1 for i in ids)))
