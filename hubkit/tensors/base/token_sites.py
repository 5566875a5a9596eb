"""Where rows of single tokens act: virtual sites beside the embedding table and an output head of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from hubkit.tensors.base.site import Site

ROWS = "rows"
"""The kind of the virtual sites where rows of tokens act."""
SUFFIX = ".token_adapter"


def token_table(site: Site) -> Tensor:
    """The weight of a table or head with one row per token, (vocabulary, hidden)."""
    return site.weight().t() if site.transposed else site.weight()


def table_size(site: Site) -> tuple[int, int]:
    """(vocabulary, hidden) of a table or head."""
    return (site.shape[1], site.shape[0]) if site.transposed else site.shape


def row_sites(sites: Mapping[str, Site], table: Site | None, is_head: Callable[[str], bool]) -> dict[str, Site]:
    """The virtual sites beside the embedding table and beside an output head that is not tied to it."""
    if table is None:
        return {}
    heads = [s for s in sites.values() if is_head(s.name) and not s.tied and s.shape == table_size(table)]
    return {s.name + SUFFIX: replace(s, name=s.name + SUFFIX, kind=ROWS) for s in [table, *heads[:1]]}
