"""Layer-wise learning rates: which layer a site is in, and what decay makes of its learning rate.

ULMFiT, Howard and Ruder 2018, https://arxiv.org/abs/1801.06146, §3.1; in the form of ELECTRA, Clark et al. 2020,
https://arxiv.org/abs/2003.10555: rate · decay^(steps down from the top), the embeddings below layer 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hubkit.errors import HubkitError
from hubkit.tensors.base.layers import layer_of

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base


def layers_of(base: Base) -> int:
    """How many layers a base has."""
    return 1 + max((number for site in base.sites if (number := layer_of(site)) is not None), default=-1)


def layer_rate(site: str, decay: float, depth: int) -> float:
    """What multiplies the learning rate at a site.

    Args:
        decay: of one layer to the one below it; 1.0: none.
        depth: how many layers the base has.
    """
    from hubkit.tensors.base.arch import arch_of

    layer = layer_of(site)
    if layer is None:  # what is outside of the layers lies above them, unless it is an embedding
        layer = -1 if site.rpartition(".")[2] in arch_of("").embeddings else depth
    return float(decay ** (depth - layer))


def require_depth(base: Base, decay: float, depth: int) -> None:
    """Refuses a decay that counts from another number of layers than the base has: ``HK-CONFIG``."""
    found = layers_of(base)
    if decay != 1.0 and depth != found:
        raise HubkitError(
            "HK-CONFIG",
            "layer-wise decay counts down from the top of the base",
            where=base.source,
            want=f"depth {found}",
            have=f"depth {depth}",
            fix=f"--set depth={found}",
        )
