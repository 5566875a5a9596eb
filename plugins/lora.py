"""LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021, https://arxiv.org/abs/2106.09685

    y = W x + s · B A x        A (r, in), B (out, r), B = 0 at the start

with s = alpha / r, or alpha / sqrt(r) with rank stabilization (rsLoRA, https://arxiv.org/abs/2312.03732).
On an embedding x is one-hot: the rows of Aᵀ take the place of A x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from hubkit.methods.api import (
    Adapter,
    Base,
    Delta,
    HubkitError,
    LowRank,
    MethodInfo,
    PeftForm,
    Site,
    foreign_files,
    hookimpl,
    pattern_value,
)


@dataclass(frozen=True)
class LoraConfig:
    """Configuration of LoRA.

    Args:
        targets: ``all-linear`` (all but the output head), an expression, or names of modules.
        rank: r.
        alpha: numerator of the scale.
        dropout: probability with which components of x are dropped before A, in training only.
        rslora: scale by 1/sqrt(r) instead of 1/r.
        rank_pattern: module expression -> r, where it differs.
        alpha_pattern: module expression -> alpha, where it differs.
        init: values of a fresh A: kaiming (uniform, as the reference code) or gaussian (N(0, 1/r²)); B is zero.
    """

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self) -> None:
        wrong = [f"rank {r}" for r in (self.rank, *self.rank_pattern.values()) if r < 1]
        wrong += [] if 0 <= self.dropout < 1 else [f"dropout {self.dropout}"]
        if wrong:
            raise HubkitError("HK-CONFIG", "out of range", want="rank >= 1, 0 <= dropout < 1", have=wrong)

    def rank_at(self, site: str) -> int:
        """r of one site."""
        return pattern_value(self.rank_pattern, site, self.rank)

    def scale_at(self, site: str) -> float:
        """s of one site."""
        rank, alpha = self.rank_at(site), pattern_value(self.alpha_pattern, site, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


class LoraPart(LowRank):
    """B·A at one site."""

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config.rank_at(site.name), config.scale_at(site.name), config.dropout)
        self.init = config.init

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        nn.init.zeros_(self.B)
        if self.init == "gaussian" or site.kind == "embedding":
            nn.init.normal_(self.A, std=1 / self.A.shape[0], generator=generator)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)


PEFT = PeftForm(
    peft_type="LORA",
    roles={
        "linear": {"A": "lora_A.weight", "B": "lora_B.weight"},
        "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
    },
    options={
        "r": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "use_rslora": "rslora",
        "rank_pattern": "rank_pattern",
        "alpha_pattern": "alpha_pattern",
    },
    defaults={"rank": 8, "alpha": 8.0, "dropout": 0.0, "rslora": False},
    selection=frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"}),
    allowed={
        "bias": ("none",),
        "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
        "layers_pattern": (None,),
        "layers_to_transform": (None,),
        "modules_to_save": (None,),
        "use_dora": (False,),
    },
    ignored=frozenset(
        {
            "corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "megatron_core", "qalora_group_size",
        }
    ),
    transposed="fan_in_fan_out",
    base_copies=("base_layer.weight",),
)  # fmt: skip


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="lora",
        summary="LoRA: a low-rank update of each chosen weight; merges exactly",
        config=LoraConfig,
        paper="https://arxiv.org/abs/2106.09685",
        peft=PEFT,
        recipe={"learning_rate": 2e-4, "weight_decay": 0.0},
        sources="QLoRA (https://arxiv.org/abs/2305.14314) §4 and A.2: all linear layers, constant 2e-4 up to 13B",
        kinds=("linear", "embedding"),
        low_rank=lambda targets, rank: LoraConfig(targets=targets, rank=rank, alpha=float(rank)),
    )


@hookimpl
def inject(base: Base, config: LoraConfig) -> Mapping[str, LoraPart]:
    return {site.name: LoraPart(site, config) for site in base.match(config.targets, ("linear", "embedding"))}


@hookimpl
def train_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor], config: LoraConfig) -> Delta:
    return Delta.low_rank(tensors["B"] * config.scale_at(site.name), tensors["A"])


@hookimpl
def export(adapter: Adapter, target: str) -> Mapping[str, bytes]:
    return foreign_files(adapter, target)
