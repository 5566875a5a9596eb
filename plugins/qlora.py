"""QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314

    y = decode(NF4(W)) x + s · B A x        A (r, in), B (out, r), B = 0 at the start

LoRA on a base whose linear layers are packed in 4 bits (NF4 in blocks of 64, their absmax in 8 bits). The base is
decoded to multiply, in its own dtype, and its gradient is never made. On disk the adapter is a plain LoRA.

It merges into the decoded weights that it was trained beside, decode(NF4(W)) + s·B·A, stored in 16 bits. Not into the
4-bit grid: the levels of a block lie further apart than what training changed, so most of the change would be rounded
away. Nor, unless it is asked for, into W: the adapter has learned to make up for what W has lost in its 4 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hubkit.methods.api import Base, BaseFacts, Delta, MethodInfo, Part, PeftForm, Site, hookimpl, width_recipe
from hubkit.plugins.lora import PEFT, RECIPE, SOURCES, LoraConfig, LoraPart

CODEC = "nf4/64/double"


@dataclass(frozen=True)
class QloraConfig(LoraConfig):
    """Configuration of QLoRA: LoRA's.

    Args:
        init: values of a fresh A: kaiming (uniform, as the reference code) or gaussian (N(0, 1/r²)); B is zero.
    """

    init: Literal["kaiming", "gaussian"] = "kaiming"


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="qlora",
        summary="QLoRA: LoRA on a base in 4 bits; merges into the decoded weights that it was trained beside",
        config=QloraConfig,
        paper="https://arxiv.org/abs/2305.14314",
        recipe=RECIPE,
        sources=f"as for LoRA: {SOURCES}; the paper, for 7B and more: r 64 with alpha 16, of which it finds r without"
        " influence when all layers are adapted (§4), constant 2e-4, gradient norm 0.3, dropout 0.1 up to 13B (B.2)",
        kinds=("linear", "embedding"),
        traits=("low-rank", "quantized-base"),
    )


@hookimpl
def recipe_for(facts: BaseFacts, config: QloraConfig) -> Mapping[str, Any]:
    return width_recipe(facts, RECIPE)


@hookimpl
def grown(config: QloraConfig, given: frozenset[str], sites: Mapping[str, Site]) -> QloraConfig | None:
    return config.grown(given, sites)


@hookimpl
def inject(base: Base, config: QloraConfig) -> Mapping[str, Part]:
    base.quantize(CODEC)
    return config.parts(base, ("linear", "embedding"), lambda site: LoraPart(site, config))


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor], config: QloraConfig) -> Delta:
    return Delta.low_rank(tensors["B"] * config.scale_at(site.name), tensors["A"])


@hookimpl
def foreign_form(target: str) -> PeftForm | None:
    return PEFT if target == "peft" else None


@hookimpl
def learning_rate(config: QloraConfig, site: Site, role: str) -> float:
    return config.learning_rate(site, role)
