"""What parts hold of their base's own values, when the base moves from W to W'.

A change is the same change on any base. A module that is held whole, V, would undo what moved beneath it: it goes on as
V + (W' - W), the same change again; so do rows of tokens that the base has. What reads the weight live (a magnitude per
row) is kept as it is, for its method alone knows what it would be.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from hubkit.tensors.base.delta import accumulation_dtype
from hubkit.tensors.base.site import Site
from hubkit.tensors.base.token_sites import SUFFIX, token_table
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.vocabulary import TokenRows
from hubkit.tensors.parts.whole import WholeModule


def holds_values(adapter: Adapter, moved: Collection[str]) -> list[str]:
    """The places among `moved` where parts hold the base's own values, changed by training."""
    held = {name for name, part in adapter.parts.items() if isinstance(part, WholeModule | TokenRows)}
    return [name for name in adapter.parts if name in held and name.removesuffix(SUFFIX) in moved]


def reads_values(adapter: Adapter, moved: Collection[str]) -> list[str]:
    """The places among `moved` where parts read the base's weight while they act."""
    parts = adapter.edits().items()
    return [name for name, part in parts if part.reads_weight and name in moved]


@torch.no_grad()
def carry(adapter: Adapter, old: Adapter, moved: Collection[str]) -> list[str]:
    """Carries `adapter`, read at the sites of a new base, over from the base of `old`; the places that changed.

    Args:
        old: the same adapter at the sites of the base it was made on, whose weights can be read.
        moved: sites whose values differ between the two.
    """
    changed = holds_values(adapter, moved)
    for name in changed:
        part, site, before = adapter.parts[name], adapter.base.site(name), old.base.site(name)
        if isinstance(part, TokenRows):
            table, old_table = token_table(site), token_table(before)
            known = [at for at, i in enumerate(part.ids) if i < old_table.shape[0]]
            ids = [part.ids[at] for at in known]
            part.rows.data[known] = _sum(part.rows.data[known], table[ids], old_table[ids])
            continue
        weight = part.get_parameter("weight")
        weight.data = _sum(weight.data, _stored(site, weight), _stored(before, weight))
        bias, own, old_bias = part.roles().get("bias"), site.bias(), before.bias()
        if bias is not None and own is not None and old_bias is not None:
            bias.data = _sum(bias.data, own, old_bias)
    return changed


def _sum(value: Tensor, new: Tensor, old: Tensor) -> Tensor:
    wide = accumulation_dtype(value.dtype)
    return (value.to(wide) + (new.to(wide) - old.to(wide))).to(value.dtype)


def _stored(site: Site, like: Tensor) -> Tensor:
    """The base's weight as the module stores it."""
    weight = site.weight()
    return (weight.t() if site.transposed else weight).reshape(like.shape)
