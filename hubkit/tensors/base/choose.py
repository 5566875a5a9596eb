"""Choosing blocks of a base: the sub-layers that a method acts at, by role and layer."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.arch import known_layers
from hubkit.tensors.base.archfile import VARIABLE
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.blocks import Block


def choose_blocks(base: Base, roles: Sequence[str], layers: Sequence[int] = ()) -> list[Block]:
    """The blocks of `base` of the given roles in the given layers (none given: all), in order.

    Raises:
        HubkitError: ``HK-TARGET`` for an architecture whose sub-layers are not known, a layer that is not there, or
            none of these roles.
    """
    blocks = [site for site in base.sites.values() if isinstance(site, Block)]
    if not blocks:
        raise _unknown(base)
    count = max(block.layer for block in blocks) + 1
    beyond = sorted({layer for layer in layers if not 0 <= layer < count})
    if beyond:
        raise HubkitError(
            "HK-TARGET",
            f"the base has no layer {', '.join(map(str, beyond))}",
            where=base.source,
            want=f"0 to {count - 1}",
            have=", ".join(map(str, beyond)),
            status=USAGE,
        )
    chosen = [block for block in blocks if block.role in roles and (not layers or block.layer in layers)]
    if not chosen:
        raise HubkitError(
            "HK-TARGET",
            "the base has no such sub-layers",
            where=base.source,
            want=" or ".join(roles),
            have=sorted({f"{block.sublayer}: {block.role}" for block in blocks}),
        )
    return chosen


def _unknown(base: Base) -> HubkitError:
    """The refusal of a base without blocks."""
    kind = base.arch.model_type or "no model_type"
    if base.arch.layers:
        marks = sorted({one.projection or one.residual for one in base.arch.sublayers})
        return HubkitError(
            "HK-TARGET",
            "the base has none of the sub-layers that its architecture has",
            where=base.source,
            want=[f"{stack}.0.{mark}" for stack in base.arch.layers for mark in marks],
            have=kind,
            fix=f"describe them in a file that {VARIABLE} names, or take a method that acts at weights",
        )
    own = json.dumps({base.arch.model_type: {"like": "llama"}})
    return HubkitError(
        "HK-TARGET",
        "where the attention and feed-forward sub-layers of this architecture are is not known",
        where=base.source,
        want=f"one of: {', '.join(known_layers())}",
        have=kind,
        fix=f"if its layers are built as another's are, write {own} into a file and name it in {VARIABLE}; or take a "
        "method that acts at weights",
    )
