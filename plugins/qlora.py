"""QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314

    y = decode(NF4(W)) x + s · B A x        A (r, in), B (out, r), B = 0 at the start

LoRA on a base whose linear layers are packed in 4 bits (NF4 in blocks of 64, their absmax in 8 bits). The base is
decoded to multiply, in its own dtype, and its gradient is never made. On disk the adapter is a plain LoRA.

It merges into the original 16-bit weights: W + s·B·A. Not into the 4-bit grid: the levels of a block lie further
apart than what training changed, so most of the change would be rounded away. The small difference between W and the
decoded weight, which the adapter was trained beside, remains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hubkit.plugins.lora import PEFT, LoraConfig, LoraPart
from torch import Tensor, nn

from hubkit.methods.api import Adapter, Base, Delta, MethodInfo, Part, Site, foreign_files, hookimpl

CODEC = "nf4/64/double"


@dataclass(frozen=True)
class QloraConfig(LoraConfig):
    """Configuration of QLoRA: LoRA's, with the defaults of the paper.

    Args:
        rank: r; the paper's 64.
        alpha: numerator of the scale; the paper's 16.
        dropout: the paper's 0.1 for models up to 13B (0.05 above).
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="qlora",
        summary="QLoRA: LoRA on a base in 4 bits; merges into the original weights",
        config=QloraConfig,
        paper="https://arxiv.org/abs/2305.14314",
        peft=PEFT,
        recipe={"learning_rate": 2e-4, "schedule": "constant", "warmup": 0.0, "clip": 0.3, "weight_decay": 0.0},
        sources="§4 and B.2: all linear layers, r 64, alpha 16, constant 2e-4 up to 13B (1e-4 above), norm 0.3",
        kinds=("linear", "embedding"),
    )


@hookimpl
def inject(base: Base, config: QloraConfig) -> Mapping[str, Part]:
    base.quantize(CODEC)
    return config.parts(base, ("linear", "embedding"), lambda site: LoraPart(site, config))


@hookimpl
def train_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor], config: QloraConfig) -> Delta:
    return Delta.low_rank(tensors["B"] * config.scale_at(site.name), tensors["A"])


@hookimpl
def export(adapter: Adapter, target: str) -> Mapping[str, bytes]:
    return foreign_files(adapter, target)
