"""IA3: Few-Shot Parameter-Efficient Fine-Tuning, Liu et al. 2022, https://arxiv.org/abs/2205.05638

    y = l ⊙ (W x + b)    at keys and values, l (out, 1)
    y = W (l ⊙ x) + b    at the feed-forward's down projection, l (1, in)

with l = 1 at the start. Either way the weight becomes l ⊙ W, and at an output the bias l ⊙ b.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hubkit.methods.api import Base, Delta, Edit, MethodInfo, PeftForm, Site, hookimpl


@dataclass(frozen=True)
class IA3Config:
    """Configuration of IA3.

    Args:
        targets: modules whose output is rescaled.
        feedforward: modules whose input is rescaled; they need not be among the targets.
    """

    targets: str | tuple[str, ...] = ("k_proj", "v_proj")
    feedforward: str | tuple[str, ...] = ("down_proj",)


class Rescale(Edit):
    """The vector l, as a column at an output or a row at an input."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.empty(shape))

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        nn.init.ones_(self.l)


class Outputs(Rescale):
    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y * (self.l - 1).flatten().to(y.dtype)


class Inputs(Rescale):
    reads_weight = True

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return nn.functional.linear(x * (self.l - 1).to(x.dtype), site.weight())


PEFT = PeftForm(
    "IA3", roles={"linear": {"l": "ia3_l"}}, options={}, modules={"feedforward_modules": "feedforward"},
    selection=frozenset({"exclude_modules"}), allowed={"init_ia3_weights": (True,), "modules_to_save": (None,)},
    transposed="fan_in_fan_out",
)  # fmt: skip


@hookimpl
def describe() -> MethodInfo:
    summary = "IA3: rescaled keys, values and inner activations; merges exactly"
    paper, recipe = "https://arxiv.org/abs/2205.05638", {"learning_rate": 3e-3, "weight_decay": 0.0}
    return MethodInfo("ia3", summary, IA3Config, paper, recipe=recipe, sources="the paper's T-Few recipe")


@hookimpl
def inject(base: Base, config: IA3Config) -> Mapping[str, Rescale]:
    inputs = {site.name: Inputs(1, site.shape[1]) for site in base.match(config.feedforward, "linear")}
    return {site.name: Outputs(site.shape[0], 1) for site in base.match(config.targets, "linear")} | inputs


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor]) -> Delta:
    change, bias = tensors["l"] - 1, site.bias()
    at_output = change.shape == (site.shape[0], 1)
    return Delta.full(change * site.weight(), change.flatten() * bias if at_output and bias is not None else None)


@hookimpl
def foreign_form(target: str) -> PeftForm | None:
    return PEFT if target == "peft" else None
