"""Output heads that a base ties to its embedding table: one tensor, two sites.

keep    one change Δ (hidden, vocabulary), held at the table, acts at the head as Δᵀ: live, merged and in files; the
        merged model ties them still
break   only what was chosen changes; the merged model has two tensors and says so
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site
from hubkit.tensors.parts.part import Edit, Part

Tied = Literal["keep", "break"]


class TiedChange(Edit):
    """The change of an embedding table, acting at the output head that is tied to it: no tensors of its own.

    Args:
        table: the part at the embedding.
        site: the embedding's name.
    """

    def __init__(self, table: Edit, site: str) -> None:
        super().__init__()
        vars(self)["table"] = table  # not a child: its tensors are those of the table's site
        self.site = site

    @property
    def part(self) -> Edit:
        """The part at the table."""
        held: Edit = vars(self)["table"]
        return held

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        """Nothing: the table's part is reset at its own site."""

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.part.at_head(x, y, site)

    def seen_from(self, head: Site) -> Site:
        """The table's site, given the head's."""
        return replace(
            head,
            name=self.site,
            kind="embedding",
            shape=head.shape[::-1],
            transposed=not head.transposed,
            tied=False,
            bias_tensor=None,
            change=None,
        )

    def values(self) -> Mapping[str, Tensor]:
        return self.part.head_values()


def tied_pairs(base: Base) -> dict[str, str]:
    """Output head -> the embedding table it is tied to."""
    tables = {site.tensor: site.name for site in base.sites.values() if site.kind == "embedding"}
    return {s.name: tables[s.tensor] for s in base.sites.values() if s.tied and s.tensor in tables}


def at_tables(base: Base, names: Collection[str]) -> set[str]:
    """`names` of sites with every tied head replaced by its table, where the change of both is held."""
    tables = tied_pairs(base)
    return {tables.get(name, name) for name in names}


def with_tied_heads(base: Base, parts: Mapping[str, Part]) -> dict[str, Part]:
    """`parts` with one more at every tied head whose table has a part, and that has none itself."""
    heads: dict[str, Part] = {}
    for head, table in tied_pairs(base).items():
        held = parts.get(table)
        if isinstance(held, Edit) and head not in parts:
            heads[head] = TiedChange(held, table)
    return {**parts, **heads}


def keeps_tie(parts: Mapping[str, Part], base: Base, head: Site) -> bool:
    """Whether `parts` leave the tied output head `head` what its embedding table is: both change alike, or neither."""
    table = tied_pairs(base).get(head.name)
    if table in parts:
        return isinstance(parts.get(head.name), TiedChange)
    return head.name not in parts
