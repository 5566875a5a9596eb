"""DoRA: Weight-Decomposed Low-Rank Adaptation, Liu et al. 2024, https://arxiv.org/abs/2402.09353

    y = m ⊙ (W + s · B A) x / ‖W + s · B A‖ + b        m (out,), one norm per row of the weight

with B = 0 and m = ‖W‖ at the start. The norm is held constant in the backward pass (§4.3 of the paper). It needs no
product as large as the weight: with W Aᵀ (out, r) and A Aᵀ (r, r),

    ‖Wᵢ + s Bᵢ A‖² = ‖Wᵢ‖² + s Bᵢ · (2 (W Aᵀ)ᵢ + s (A Aᵀ) Bᵢ)

Rows where that cancels are summed themselves. A GPU sums all rows so: to ask it for a few would be to wait for it, and
there the product costs less than the waiting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.methods.api import (
    Base,
    BaseFacts,
    Delta,
    Edit,
    LowRankConfig,
    MethodInfo,
    Part,
    PeftForm,
    Site,
    hookimpl,
    version_of,
    width_recipe,
)
from hubkit.plugins.lora import PEFT as LORA
from hubkit.plugins.lora import RECIPE

CANCELLED = 0.25
"""Share of ‖Wᵢ‖² below which ‖Wᵢ + s Bᵢ A‖² is taken from that row itself: the sum above has lost digits there."""
TILE = 1 << 25
"""Elements of W + s B A that a GPU has in memory at once: 128 MiB in fp32."""


@dataclass(frozen=True)
class DoraConfig(LowRankConfig):
    """Configuration of DoRA.

    Args:
        init: values of a fresh A: kaiming (uniform, as the reference code) or gaussian (N(0, 1/r²)); B is zero.
        lora_plus_ratio: learning rate of B and m as a multiple of that of A, as PEFT groups them (LoRA+).
    """

    init: Literal["kaiming", "gaussian"] = "kaiming"


class DoraPart(Edit):
    """A (r, in), B (out, r) and the magnitudes m (out,).

    Under dropout it is PEFT's: what the adapter adds is computed from the dropped x throughout, the base's product too.
    """

    reads_weight = True
    wide = frozenset({"m"})

    def __init__(self, site: Site, config: DoraConfig) -> None:
        super().__init__()
        out_features, in_features = site.shape
        rank = config.rank_at(site.name)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.m = nn.Parameter(torch.empty(out_features))
        self.scale, self.dropout, self.init = config.scale_at(site.name), config.dropout, config.init
        self._squares: tuple[object, Tensor] | None = None
        self._frozen: tuple[object, Tensor] | None = None

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        nn.init.zeros_(self.B)
        if self.init == "gaussian":
            nn.init.normal_(self.A, std=1 / self.A.shape[0], generator=generator)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        self.m.copy_(self._squared(site).sqrt())

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        excess = self.excess(site).to(y.dtype)
        if self.training and self.dropout > 0:
            x = F.dropout(x, self.dropout, training=True)
            product = F.linear(x, site.weight().to(x.dtype)).to(y.dtype)
        else:
            bias = site.bias()
            product = y if bias is None else y - bias.to(y.dtype)
        low = F.linear(F.linear(x, self.A.to(x.dtype)), (self.B * self.scale).to(x.dtype)).to(y.dtype)
        return low + excess * (product + low)

    def act(self, x: Tensor, y: Tensor, site: Site, owned: bool) -> Tensor:
        if y.dtype != x.dtype or (self.training and self.dropout > 0):
            return super().act(x, y, site, owned)
        norm, bias = self.norm(site), site.bias()
        added: Tensor = Rescaled.apply(  # type: ignore[no-untyped-call]
            y if owned else y.clone(), x, self.A, self.B, self.m, norm, self.scale, bias
        )
        return added

    def excess(self, site: Site) -> Tensor:
        """m / ‖W + s B A‖ - 1, (out,): near 0 it keeps the digits that the ratio has lost in half precision."""
        return _excess(self.m, self.norm(site))

    def norm(self, site: Site) -> Tensor:
        """‖W + s B A‖ by rows, (out,), in the dtype of accumulation, a constant to autograd.

        Kept while nothing that it is made of is trained, nor anything below this part in a stack.
        """
        if torch.compiler.is_compiling():
            return self._plain_norm(site)
        if self.A.requires_grad or self.B.requires_grad or site.change is not None:
            return self._norm(site)
        key = (site.version(), version_of(self.A), version_of(self.B))
        if self._frozen is None or self._frozen[0] != key:
            self._frozen = (key, self._norm(site))
        return self._frozen[1]

    @torch.no_grad()
    def _plain_norm(self, site: Site) -> Tensor:
        """As `_norm`, all rows summed themselves: a compiler cannot look which of them cancel."""
        weight = site.weight()
        down, up = (factor.to(weight.dtype).to(self.m.dtype) for factor in (self.A, self.B))
        return _row_squares(weight, up * self.scale, down).sqrt()

    @torch.inference_mode(False)  # what is kept may be needed where there is a gradient
    @torch.no_grad()
    def _norm(self, site: Site) -> Tensor:
        squares, weight = self._squared(site), site.weight()
        return row_norm(weight, squares, self.A.to(weight.dtype), self.B.to(weight.dtype), self.scale)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _squared(self, site: Site) -> Tensor:
        """‖Wᵢ‖², (out,); the base's own is computed once."""
        if site.change is not None:
            return _row_squares(site.weight())
        key = site.version()
        if self._squares is None or self._squares[0] != key:
            self._squares = (key, _row_squares(site.weight()))
        return self._squares[1]


def row_norm(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖ by rows, (out,), in the dtype of `squares`.

    Args:
        weight: W, (out, in).
        squares: ‖Wᵢ‖², (out,).
        a: A, (r, in), and b: B, (out, r), in W's dtype.
    """
    wide = squares.dtype
    if weight.device.type != "cpu":
        return _row_squares(weight, b.to(wide) * scale, a.to(wide)).sqrt()
    crossed, up, down = (weight @ a.t()).to(wide), b.to(wide), a.to(wide)
    total = squares + scale * (up * (2 * crossed + scale * (up @ (down @ down.t())))).sum(1)
    cancelled = total < CANCELLED * squares
    if cancelled.any():
        total[cancelled] = (weight[cancelled].to(wide) + scale * (up[cancelled] @ down)).square().sum(1)
    return total.sqrt()


def _row_squares(weight: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """‖Wᵢ + leftᵢ right‖², (out,), in the dtype of accumulation; left (out, r) and right (r, in), or neither.

    On a GPU by tiles of rows, the same with and without factors: a fresh adapter's m is its norm to the bit.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if weight.device.type == "cpu" and left is None:
        norm: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
        return norm.square()
    found = []
    for start in range(0, weight.shape[0], rows := max(1, TILE // weight.shape[1])):
        tile = weight[start : start + rows].to(wide)
        if left is not None and right is not None:
            tile = torch.addmm(tile, left[start : start + rows], right)
        found.append(torch.linalg.vector_norm(tile, dim=1).square())
    return torch.cat(found)


def _excess(m: Tensor, norm: Tensor) -> Tensor:
    """m / norm - 1; a row without direction stays as it is."""
    return torch.where(norm > 0, m / norm - 1, torch.zeros_like(norm))


class Rescaled(torch.autograd.Function):
    """The whole of DoRA at a linear layer: from its output y = W x + b to m ⊙ (y - b + s B A x) / norm + b.

    y (..., out), written into, and x (..., in) of one dtype; A (r, in), B (out, r), m (out,), perhaps fp32 masters;
    norm (out,) and b constants. For the backward pass x, A x and z = (W + s B A) x, m's partner, are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, m: Tensor, norm: Tensor, scale: float, bias: Tensor | None
    ) -> Tensor:
        down, up, excess = a.to(x.dtype), b.to(x.dtype), _excess(m, norm).to(y.dtype)
        low = F.linear(x, down).reshape(-1, down.shape[0])
        # added to y as it is, the bias in it: (y - b) + b is not y in floating point, and a fresh part gives y itself
        total = y.detach().view(-1, y.shape[-1]).addmm_(low, up.t(), alpha=scale)
        z = total if bias is None else total - bias
        ctx.save_for_backward(x, low, down, up, z, excess, norm)
        ctx.scale, ctx.dtype = scale, a.dtype
        # of y's shape from the start: a view that a Function returns may not be written into, as Falcon's layers do
        return torch.addcmul(total.view(y.shape), z.view(y.shape), excess)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, down, up, z, excess, norm = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_a, needs_b, needs_m = ctx.needs_input_grad[1:5]
        grad_z = torch.addcmul(flat, flat, excess)
        grad_x = grad_a = grad_b = grad_m = None
        if needs_m:
            total = (flat * z).sum(0, dtype=norm.dtype)
            grad_m = torch.where(norm > 0, total / norm, torch.zeros_like(total)).to(ctx.dtype)
        if needs_b:
            grad_b = (grad_z.t() @ low).to(ctx.dtype).mul_(ctx.scale)
        if needs_a or needs_x:
            grad_low = (grad_z @ up).mul_(ctx.scale)
            grad_a = (grad_low.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtype) if needs_a else None
            grad_x = (grad_low @ down).view(x.shape) if needs_x else None
        return grad_z.view(grad.shape), grad_x, grad_a, grad_b, grad_m, None, None, None


PEFT = replace(
    LORA,
    roles={
        "linear": {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"},
        "rows": LORA.roles["rows"],
    },
    allowed={key: values for key, values in LORA.allowed.items() if key != "use_dora"},
    requires={"use_dora": True},
    base_copies=(),
)


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="dora",
        summary="DoRA: a low-rank update of each weight's direction and a magnitude per row; merges exactly",
        config=DoraConfig,
        paper="https://arxiv.org/abs/2402.09353",
        recipe=RECIPE,
        sources="LoRA's: LoRA Without Regret (https://thinkingmachines.ai/blog/lora/): all linear layers, about ten"
        " times the rate of full fine-tuning, by the base's width: 1.3e-3 at 576 hidden units, 2.9e-4 at 4096; measured"
        " on a 135M Llama, 24 steps at 1e-3: held-out loss 2.07 before, 1.29 after, as LoRA",
        traits=("low-rank",),
    )


@hookimpl
def recipe_for(facts: BaseFacts) -> Mapping[str, Any]:
    return width_recipe(facts, RECIPE)


@hookimpl
def grown(config: DoraConfig, given: frozenset[str], sites: Mapping[str, Site]) -> DoraConfig | None:
    return config.grown(given, sites)


@hookimpl
def inject(base: Base, config: DoraConfig) -> Mapping[str, Part]:
    return config.parts(base, "linear", lambda site: DoraPart(site, config))


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor], config: DoraConfig) -> Delta:
    a, b, scale, weight = tensors["A"], tensors["B"], config.scale_at(site.name), site.weight()
    with torch.no_grad():
        norm = row_norm(weight, _row_squares(weight), a, b, scale)
    excess = _excess(tensors["m"], norm)[:, None]
    return Delta(left=(1 + excess) * b * scale, right=a, dense=excess * weight)


@hookimpl
def foreign_form(target: str) -> PeftForm | None:
    return PEFT if target == "peft" else None


@hookimpl
def learning_rate(config: DoraConfig, site: Site, role: str) -> float:
    return config.learning_rate(site, role)
