"""Selective fine-tuning: biases, norm gains, chosen layers or modules, and nothing else.

BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, Ben Zaken et al. 2021,
https://arxiv.org/abs/2106.10199 trains the biases; where a base has none (Llama and its relatives), the gains of the
norms do as well: Tuning LayerNorm in Attention, Zhao et al. 2023, https://arxiv.org/abs/2312.11420.

    y = (W + ΔW) x + b + Δb        ΔW, Δb = 0 at the start, of the chosen tensors alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hubkit.methods.api import (
    Base,
    Delta,
    HubkitError,
    MethodInfo,
    Part,
    Site,
    additive_parts,
    hookimpl,
    layer_rate,
    require_depth,
)

KINDS = ("linear", "embedding", "norm")


@dataclass(frozen=True)
class SelectiveConfig:
    """Configuration of selective fine-tuning.

    Args:
        biases: modules whose bias is trained: all (of those that have one), an expression, names, or none at all.
        weights: modules whose weight is trained: all-norm, all-linear, an expression, names, or none at all.
        layers: numbers of the layers that are trained, ``0-11`` or ``0,4,8-11``; everywhere when empty.
        layer_decay: what multiplies the learning rate from one layer to the one below it, in (0, 1].
        depth: how many layers the base has; needed where layer_decay is not 1.
        tied: where the base ties its output head to its embeddings and one of the two is chosen: keep, one change acts
            at both, as when the tensor itself is trained; break, only that one changes.
    """

    biases: str | tuple[str, ...] = "all"
    weights: str | tuple[str, ...] = "all-norm"
    layers: str | tuple[int, ...] = ()
    layer_decay: float = 1.0
    depth: int = 0
    tied: Literal["keep", "break"] = "keep"

    def __post_init__(self) -> None:
        if not 0 < self.layer_decay <= 1:
            have = f"layer_decay {self.layer_decay}"
            raise HubkitError("HK-CONFIG", "out of range", want="0 < layer_decay <= 1", have=have)


def _with_bias(base: Base, config: SelectiveConfig) -> set[str]:
    """The sites whose bias is chosen; every name or expression must choose one at least."""
    chosen, layers = config.biases, config.layers or None
    if chosen == "all":
        return {site.name for site in base.match(".*", KINDS, layers=layers) if site.bias_tensor and not site.tied}
    found: set[str] = set()
    for target in [chosen] if isinstance(chosen, str) else [[name] for name in chosen]:
        here = {site.name for site in base.match(target, KINDS, layers=layers) if site.bias_tensor}
        if not here:
            raise HubkitError(
                "HK-TARGET",
                f"the modules {target!r} have no bias",
                where=base.source,
                fix="--set biases=all trains those that there are; --set weights= chooses weights",
            )
        found |= here
    return found


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="selective",
        summary="selective fine-tuning: biases, norms, or chosen layers and modules; merges exactly",
        config=SelectiveConfig,
        paper="https://arxiv.org/abs/2106.10199",
        recipe={"learning_rate": 1e-3, "weight_decay": 0.0},
        sources="BitFit (https://arxiv.org/abs/2106.10199) A.2: 1e-4 to 1e-3 for biases; measured on the norms of a"
        " 135M Llama; whole weights want a rate as in full fine-tuning",
        kinds=KINDS,
    )


@hookimpl
def inject(base: Base, config: SelectiveConfig) -> Mapping[str, Part]:
    require_depth(base, config.layer_decay, config.depth)
    weights = {site.name for site in base.match(config.weights, KINDS, layers=config.layers or None)}
    return additive_parts(base, weights, _with_bias(base, config), config.tied)


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor]) -> Delta:
    return Delta.full(tensors.get("weight"), tensors.get("bias"))


@hookimpl
def learning_rate(config: SelectiveConfig, site: Site) -> float:
    return layer_rate(site.name, config.layer_decay, config.depth)
