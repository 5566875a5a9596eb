"""LoRA: Low-Rank Adaptation of Large Language Models, Hu et al. 2021, https://arxiv.org/abs/2106.09685

    y = W x + s · B A x        A (r, in), B (out, r), B = 0 at the start

with s = alpha / r, or alpha / sqrt(r) with rank stabilization (rsLoRA, https://arxiv.org/abs/2312.03732).
On an embedding x is one-hot: the rows of Aᵀ take the place of A x.

PiSSA (https://arxiv.org/abs/2404.02948) and OLoRA (https://arxiv.org/abs/2406.01775) start A and B at factors of W
itself and take these away again, the base untouched:

    y = W x + s · (B A - B₀ A₀) x

LoRA+ (https://arxiv.org/abs/2402.12354) trains B at a multiple of A's learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hubkit.methods.api import (
    Adapter,
    Base,
    BaseFacts,
    Delta,
    HubkitError,
    LowRank,
    LowRankConfig,
    MethodInfo,
    Part,
    PeftForm,
    Site,
    foreign_files,
    hookimpl,
    width_recipe,
)

PRINCIPAL = ("pissa", "olora")
"""Values of `init` that start at factors of the weight."""


@dataclass(frozen=True)
class LoraConfig(LowRankConfig):
    """Configuration of LoRA.

    Args:
        init: values of a fresh A: kaiming (uniform, as the reference code) or gaussian (N(0, 1/r²)), B is zero then; or
            A and B from the weight: pissa (its first singular vectors) or olora (its QR factors), stored with rank 2r.
    """

    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init in PRINCIPAL and min([self.alpha, *self.alpha_pattern.values()]) <= 0:
            raise HubkitError("HK-CONFIG", f"{self.init} divides by the scale", want="alpha > 0", have=str(self.alpha))

    def plain(self) -> LoraConfig:
        """The configuration whose ordinary parts are what is stored under this one: rank 2r at the same scale."""
        if self.init not in PRINCIPAL:
            return self
        factor = math.sqrt(2) if self.rslora else 2.0
        return replace(
            self,
            init="kaiming",
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern={name: 2 * rank for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: factor * alpha for name, alpha in self.alpha_pattern.items()},
        )


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


class PrincipalPart(LowRank):
    """B A - B₀ A₀ at one site, held as [B - B₀, B] and [A₀; A - A₀]: an ordinary LoRA of rank 2r with that product.

    In this form a fresh part adds exact zeros, and rounding it to the base's dtype costs digits of what was trained,
    not of the weight. While it is trained, the changes of A and B lie beside the stored factors, and only they move.
    """

    change_A: nn.Parameter | None
    change_B: nn.Parameter | None

    def __init__(self, site: Site, config: LoraConfig) -> None:
        rank = config.rank_at(site.name)
        super().__init__(site, 2 * rank, config.scale_at(site.name), config.dropout)
        self.r, self.init = rank, config.init
        self.register_parameter("change_A", None)
        self.register_parameter("change_B", None)

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        factor = principal if self.init == "pissa" else orthonormal
        down, up = factor(site.weight().to(self.A.dtype), self.r, self.scale)
        self.A.zero_()[: self.r] = down
        self.B.zero_()[:, self.r :] = up
        self.requires_grad_(False)
        self.change_A = nn.Parameter(torch.zeros_like(self.A[self.r :]))
        self.change_B = nn.Parameter(torch.zeros_like(self.B[:, self.r :]))

    def roles(self) -> dict[str, nn.Parameter]:
        return {"A": self.A, "B": self.B}

    def trainables(self) -> dict[str, nn.Parameter]:
        if self.change_A is None or self.change_B is None:
            return self.roles()
        return {"A": self.change_A, "B": self.change_B}

    def values(self) -> dict[str, Tensor]:
        return {"A": self.lower(), "B": self.upper()}

    def lower(self) -> Tensor:
        if self.change_A is None:
            return self.A
        return torch.cat([self.A[: self.r], self.A[self.r :] + self.change_A])

    def upper(self) -> Tensor:
        return self.B if self.change_B is None else self.B + self.change_B.repeat(1, 2)

    @torch.no_grad()
    def settle(self) -> None:
        self.A.copy_(self.lower())
        self.B.copy_(self.upper())
        self.change_A = self.change_B = None


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s B A = U S Vᵀ, the first `rank` singular triples of `weight`; PiSSA, equation 2.

    The largest entry of each row of A is positive: torch leaves the signs open.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    left, right, root = left[:, :rank], right[:rank], (values[:rank] / scale).sqrt()
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(weight)
    return right * sign * root[:, None], left * sign.t() * root


def orthonormal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r): the first rows of R and columns of Q of `weight` = Q R; OLoRA, algorithm 1.

    As in PEFT, the scale multiplies them like any other factors. The diagonal of R is made positive.
    """
    q, r = torch.linalg.qr(weight)
    q, r = q[:, :rank], r[:rank]
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(weight)
    return r * sign[:, None], q * sign


PEFT = PeftForm(
    peft_type="LORA",
    roles={
        "linear": {"A": "lora_A.weight", "B": "lora_B.weight"},
        "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
        "rows": {"rows": "trainable_tokens_delta"},
    },
    parameters="target_parameters",
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
        "use_dora": (False,),
    },
    ignored=frozenset(
        {
            "corda_config", "eva_config", "loftq_config", "megatron_core", "qalora_group_size",
            "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio",  # of ms-swift: https://github.com/modelscope/ms-swift
        }
    ),
    transposed="fan_in_fan_out",
    saved="modules_to_save",
    tied="ensure_weight_tying",
    rows="trainable_token_indices",
    base_copies=("base_layer.weight",),
)  # fmt: skip


RECIPE = {"learning_rate": 1e-3, "weight_decay": 0.0}
SOURCES = (
    "LoRA Without Regret (https://thinkingmachines.ai/blog/lora/): all linear layers, about ten times the rate of full"
    " fine-tuning, whatever the rank, which need only grow with the target tokens; its cookbook, by which training"
    " sets the rate: 5e-4 · (2000 / hidden size)^0.781 on bases like Llama, so 1.3e-3 at 576 hidden units and 2.9e-4 at"
    " 4096, with the exponent 0.0775 on Qwen, and at most 5e-4 on others. Starts at the weight (pissa, olora) and bases"
    " of unknown width keep 1e-3; measured on a 135M Llama, 24 steps: held-out loss 2.07 before, 1.32 at 5e-4, 1.29 at"
    " 1e-3, 1.25 at 2e-3"
)


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="lora",
        summary="LoRA: a low-rank update of each chosen weight; merges exactly",
        config=LoraConfig,
        paper="https://arxiv.org/abs/2106.09685",
        recipe=RECIPE,
        sources=SOURCES,
        kinds=("linear", "embedding"),
        traits=("low-rank",),
    )


@hookimpl
def recipe_for(facts: BaseFacts, config: LoraConfig) -> Mapping[str, Any]:
    return RECIPE if config.init in PRINCIPAL else width_recipe(facts, RECIPE)


@hookimpl
def grown(config: LoraConfig, given: frozenset[str], sites: Mapping[str, Site]) -> LoraConfig | None:
    return config.grown(given, sites, min if config.init in PRINCIPAL else max)


@hookimpl
def inject(base: Base, config: LoraConfig) -> Mapping[str, Part]:
    kinds = ("linear", "embedding")
    if config.init not in PRINCIPAL:
        return config.parts(base, kinds, lambda site: LoraPart(site, config))
    sites = config.sites(base, kinds)
    small = [f"{site.name}: {site.shape}" for site in sites if config.rank_at(site.name) > min(site.shape)]
    if small:
        raise HubkitError(
            "HK-CONFIG",
            f"{config.init} takes as many directions from each weight as the rank says",
            want="a rank within every weight",
            have=small,
            fix="a lower rank, or rank_pattern for these",
        )
    return config.parts(base, kinds, lambda site: PrincipalPart(site, config))


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor], config: LoraConfig) -> Delta:
    return Delta.low_rank(tensors["B"] * config.scale_at(site.name), tensors["A"])


@hookimpl
def export(adapter: Adapter, target: str) -> Mapping[str, bytes]:
    return foreign_files(replace(adapter, config=adapter.config.plain()), target)


@hookimpl
def foreign_form(target: str) -> PeftForm | None:
    return PEFT if target == "peft" else None


@hookimpl
def learning_rate(config: LoraConfig, site: Site, role: str) -> float:
    return config.learning_rate(site, role)


@hookimpl
def low_rank(targets: tuple[str, ...], rank: int, saved: tuple[str, ...], tied: Literal["keep", "break"]) -> LoraConfig:
    return LoraConfig(targets=targets, rank=rank, alpha=float(rank), modules_to_save=saved, tied=tied)
