"""Full fine-tuning as an adapter: what training adds to every tensor of the base, exactly, and the base untouched.

    y = (W + ΔW) x + b + Δb        ΔW, Δb = 0 at the start

The difference is stored (or W + ΔW itself, see `holds`), tensor by tensor, and tensors that did not change are not. So
a fine-tuned model is versioned, bound to its base, weighed, added to other adapters and merged like any of them: task
vectors, Editing Models with Task Arithmetic, Ilharco et al. 2022, https://arxiv.org/abs/2212.04089.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hubkit.methods.api import (
    Base,
    BaseFacts,
    Delta,
    HubkitError,
    MethodInfo,
    Part,
    Site,
    additive_parts,
    hookimpl,
    layer_rate,
    require_depth,
    whole_parts,
    width_recipe,
)

KINDS = ("linear", "embedding", "norm")
RECIPE = {"learning_rate": 1e-4, "weight_decay": 0.0}


@dataclass(frozen=True)
class FullConfig:
    """Configuration of full fine-tuning.

    Args:
        targets: modules that are trained: all (linear layers, embeddings, norms, and the output head), an expression,
            or names.
        biases: their biases are trained, too.
        layer_decay: what multiplies the learning rate from one layer to the one below it, in (0, 1].
        depth: how many layers the base has; needed where layer_decay is not 1.
        tied: where the base ties its output head to its embeddings and one of the two is chosen: keep, one change acts
            at both, as when the tensor itself is trained; break, only that one changes.
        tensors: the tensors that changed, as module.weight and module.bias, where not all of the targets' did: written
            by training, so that the others need not be stored.
        holds: change, what is added to each tensor; or values, all that the changed modules hold then, in the base's
            place and to the bit where the adapter acts alone.
    """

    targets: str | tuple[str, ...] = "all"
    biases: bool = True
    layer_decay: float = 1.0
    depth: int = 0
    tied: Literal["keep", "break"] = "keep"
    tensors: tuple[str, ...] = ()
    holds: Literal["change", "values"] = "change"

    def __post_init__(self) -> None:
        wrong = [name for name in self.tensors if name.rpartition(".")[2] not in ("weight", "bias")]
        wrong += [] if 0 < self.layer_decay <= 1 else [f"layer_decay {self.layer_decay}"]
        if wrong:
            raise HubkitError("HK-CONFIG", "out of range", want="0 < layer_decay <= 1, <module>.weight", have=wrong)


def _chosen(base: Base, config: FullConfig) -> tuple[set[str], set[str]]:
    """The sites whose weight, and those whose bias is trained."""
    if config.tensors:
        split = [name.rpartition(".")[::2] for name in config.tensors]
        return {site for site, role in split if role == "weight"}, {site for site, role in split if role == "bias"}
    if config.targets == "all":
        sites = [site for site in base.match(".*", KINDS) if not site.tied]
    else:
        sites = base.match(config.targets, KINDS)
    return {site.name for site in sites}, {site.name for site in sites if site.bias_tensor and config.biases}


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="full",
        summary="full fine-tuning, stored as the difference to the base; merges exactly",
        config=FullConfig,
        paper="https://arxiv.org/abs/2212.04089",
        recipe=RECIPE,
        sources="a tenth of LoRA's, LoRA Without Regret (https://thinkingmachines.ai/blog/lora/); its cookbook, by"
        " which training sets the rate: 5e-5 · (2000 / hidden size)^0.781 on bases like Llama, so 1.3e-4 at 576 hidden"
        " units and 2.9e-5 at 4096, with the exponent 0.0775 on Qwen, and at most 5e-5 on others; measured on a 135M"
        " Llama, 24 steps: held-out loss 2.07 before, 1.27 at 5e-5, 1.23 at 1e-4 and at 2e-4",
        kinds=KINDS,
        traits=("whole-weights",),
    )


@hookimpl
def recipe_for(facts: BaseFacts) -> Mapping[str, Any]:
    return width_recipe(facts, RECIPE, 0.1)


@hookimpl
def inject(base: Base, config: FullConfig) -> Mapping[str, Part]:
    require_depth(base, config.layer_decay, config.depth)
    weights, biases = _chosen(base, config)
    if config.holds == "values":
        return whole_parts(base, weights | biases, config.tied)
    return additive_parts(base, weights, biases, config.tied)


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor]) -> Delta:
    return Delta.full(tensors.get("weight"), tensors.get("bias"))


@hookimpl
def learning_rate(config: FullConfig, site: Site) -> float:
    return layer_rate(site.name, config.layer_decay, config.depth)


@hookimpl
def narrow(config: FullConfig, changed: frozenset[str]) -> FullConfig:
    if config.holds == "values":
        return config  # a tensor of zeros is no unchanged one
    return dataclasses.replace(config, tensors=tuple(sorted(changed)))


@hookimpl
def whole(tensors: tuple[str, ...], tied: Literal["keep", "break"], holds: Literal["change", "values"]) -> FullConfig:
    return FullConfig(tensors=tensors, tied=tied, holds=holds)
