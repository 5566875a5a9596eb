"""MoLoRA: Pushing Mixture of Experts to the Limit, Zadouri et al. 2023, https://arxiv.org/abs/2309.05444

    y = W x + b + s · Σₑ gₑ Bₑ Aₑ x        g = softmax(G x), Aₑ (r, in), Bₑ (out, r), G (experts, in)

with B = 0 and G = 0 at the start. Every token weighs the experts anew, so no single weight says the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hubkit.methods.api import Base, Edit, HubkitError, MethodInfo, Site, hookimpl


@dataclass(frozen=True)
class MoLoraConfig:
    """Configuration of MoLoRA.

    Args:
        targets: ``all-linear`` (all but the output head), an expression, or names of modules.
        experts: number of experts at each module.
        rank: r of each expert.
        alpha: the scale s is alpha / rank.
    """

    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    experts: int = 4
    rank: int = 4
    alpha: float = 8.0

    def __post_init__(self) -> None:
        if self.experts < 1 or self.rank < 1:
            have = f"experts {self.experts}, rank {self.rank}"
            raise HubkitError("HK-CONFIG", "out of range", want="experts >= 1, rank >= 1", have=have)


class Experts(Edit):
    """The experts of one site, one below the other in A and side by side in B, and the router G that weighs them."""

    def __init__(self, site: Site, config: MoLoraConfig) -> None:
        super().__init__()
        out_features, in_features = site.shape
        self.scale, self.split = config.alpha / config.rank, (config.experts, config.rank)
        self.A = nn.Parameter(torch.empty(config.experts * config.rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, config.experts * config.rank))
        self.G = nn.Parameter(torch.empty(config.experts, in_features))

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)
        nn.init.zeros_(self.G)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        gates = nn.functional.linear(x, self.G.to(x.dtype)).softmax(-1) * self.scale
        low = nn.functional.linear(x, self.A.to(x.dtype))
        low = low.view(*low.shape[:-1], *self.split) * gates[..., None]
        return nn.functional.linear(low.flatten(-2), self.B.to(x.dtype))


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="molora",
        summary="MoLoRA: low-rank experts at each module, weighed token by token by a router",
        config=MoLoraConfig,
        paper="https://arxiv.org/abs/2309.05444",
        unmergeable="its router weighs the experts anew for every token, so no single weight says the same",
        recipe={"learning_rate": 3e-4, "weight_decay": 0.0},
        sources="a starting point: a usual rate of low-rank adapters under AdamW; the paper trains with Adafactor",
    )


@hookimpl
def inject(base: Base, config: MoLoraConfig) -> Mapping[str, Experts]:
    return {site.name: Experts(site, config) for site in base.match(config.targets, "linear")}
