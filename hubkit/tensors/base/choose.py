"""Choosing blocks of a base: the sub-layers that a method acts at, by role and layer."""

from __future__ import annotations

from collections.abc import Sequence

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.arch import known_layers
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block


def choose_blocks(base: Base, roles: Sequence[str], layers: Sequence[int] = ()) -> list[Block]:
    """The blocks of `base` of the given roles in the given layers (none given: all), in order.

    Raises:
        HubkitError: ``HK-TARGET`` for an architecture whose sub-layers are not known, or a layer that is not there.
    """
    blocks = [site for site in base.sites.values() if isinstance(site, Block)]
    if not blocks:
        raise HubkitError(
            "HK-TARGET", "where the attention and feed-forward sub-layers of this architecture are is not known",
            where=base.source, want=f"one of: {', '.join(known_layers())}",
            have=base.arch.model_type or "no model_type", fix="another base, or a method that acts at weights",
        )  # fmt: skip
    count = max(block.layer for block in blocks) + 1
    beyond = sorted({layer for layer in layers if not 0 <= layer < count})
    if beyond:
        raise HubkitError(
            "HK-TARGET", f"the base has no layer {', '.join(map(str, beyond))}", where=base.source,
            want=f"0 to {count - 1}", have=", ".join(map(str, beyond)), status=USAGE,
        )  # fmt: skip
    return [block for block in blocks if block.role in roles and (not layers or block.layer in layers)]
