"""Bottleneck adapters: a small network after a sub-layer, or beside it.

    f(z) = s · U act(D z + d) + u        D (k, hidden), U (hidden, k), U = u = 0 at the start

With x the residual stream, a what the sub-layer adds to it, and LN the norm of their sum where the base has one there
(BERT, RoBERTa), each placement adds f(z) to a:

    houlsby   z = a            after attention and feed-forward   Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
    pfeiffer  z = LN(x + a)    after the feed-forward             Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247
    parallel  z = x            beside the feed-forward            He et al. 2021, https://arxiv.org/abs/2110.04366
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.methods.api import (
    LATER,
    AdapterHubForm,
    Base,
    Block,
    Delta,
    Edit,
    HubkitError,
    MethodInfo,
    NotMergeable,
    Part,
    Site,
    choose_blocks,
    hookimpl,
    whole_parts,
    whole_sites,
)

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "identity": lambda z: z,
}
ROLES = {"houlsby": ("attention", "feedforward"), "pfeiffer": ("feedforward",), "parallel": ("feedforward",)}
UNMERGEABLE = "a bottleneck adapter is a network of its own beside the weights: no weight computes the same"


@dataclass(frozen=True)
class AdaptersConfig:
    """Configuration of bottleneck adapters.

    Args:
        placement: houlsby (after attention and feed-forward), pfeiffer (after the feed-forward) or parallel (to it).
        reduction: the bottleneck is hidden / reduction wide, which must come out whole.
        width: the bottleneck's width itself, instead of `reduction`.
        activation: the non-linearity in the bottleneck.
        scaling: s: a number (4 in the paper for parallel), learned (one number) or channel (one per hidden unit).
        dropout: probability with which components of the output are dropped, in training only.
        layers: numbers of the layers that get adapters, from 0; none named: all.
        init: values of a fresh adapter: zero (U = 0, so it changes nothing) or normal (N(0, 0.02²) in D and U).
        modules_to_save: names of modules that are trained as a whole beside the bottlenecks: the head of a task.
    """

    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    reduction: float = 16.0
    width: int | None = None
    activation: Literal["relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "leaky_relu", "mish", "identity"] = (
        "relu"
    )
    scaling: float | Literal["learned", "channel"] = 1.0
    dropout: float = 0.0
    layers: tuple[int, ...] = ()
    init: Literal["zero", "normal"] = "zero"
    modules_to_save: tuple[str, ...] = field(default=(), metadata=LATER)

    def __post_init__(self) -> None:
        wrong = [] if self.reduction > 0 else [f"reduction {self.reduction}"]
        wrong += [] if self.width is None or self.width >= 1 else [f"width {self.width}"]
        wrong += [] if 0 <= self.dropout < 1 else [f"dropout {self.dropout}"]
        if wrong:
            raise HubkitError(
                "HK-CONFIG", "out of range", want="reduction > 0, width >= 1, 0 <= dropout < 1", have=wrong
            )

    def width_at(self, hidden: int) -> int:
        """k.

        Raises:
            HubkitError: ``HK-CONFIG`` where hidden / reduction is not whole, with the nearest that are.
        """
        if self.width is not None:
            return self.width
        width = hidden / self.reduction
        if width >= 1 and width.is_integer():
            return int(width)
        whole = [n for n in range(1, hidden + 1) if hidden % n == 0]
        near = [max((n for n in whole if n < self.reduction), default=1), *[n for n in whole if n > self.reduction][:1]]
        raise HubkitError(
            "HK-CONFIG",
            f"a reduction of {self.reduction:g} does not divide the base's {hidden} hidden units",
            where="reduction",
            want=f"a divisor of {hidden}, or a width",
            have=f"{self.reduction:g}",
            fix=f"nearest: {', '.join(f'reduction={n} (width {hidden // n})' for n in near)}",
        )


class Bottleneck(Edit):
    """D, d, U, u and, where it is learned, s, at one block."""

    def __init__(self, site: Site, config: AdaptersConfig) -> None:
        super().__init__()
        hidden = site.shape[0]
        width = config.width_at(hidden)
        self.down = nn.Parameter(torch.empty(width, hidden))
        self.down_bias = nn.Parameter(torch.empty(width))
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.up_bias = nn.Parameter(torch.empty(hidden))
        if isinstance(config.scaling, str):
            self.scale = nn.Parameter(torch.empty(1 if config.scaling == "learned" else hidden))
        self.config = config

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        if self.config.init == "normal":
            nn.init.normal_(self.down, std=0.02, generator=generator)
            nn.init.normal_(self.up, std=0.02, generator=generator)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(self.up)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)
        if isinstance(self.config.scaling, str):
            nn.init.ones_(self.scale)

    def forward(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        z = self.seen(x, y, site)
        low = ACTIVATIONS[self.config.activation](F.linear(z, self.down.to(z.dtype), self.down_bias.to(z.dtype)))
        high = F.linear(low, self.up.to(z.dtype), self.up_bias.to(z.dtype))
        high = high * (self.scale.to(z.dtype) if isinstance(self.config.scaling, str) else self.config.scaling)
        return F.dropout(high, self.config.dropout, self.training)

    def seen(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """z: what goes into the bottleneck."""
        if self.config.placement == "houlsby":
            return y
        if self.config.placement == "parallel":
            return x
        total = x + y
        norm = site.norm if isinstance(site, Block) else None
        return total if norm is None else norm(total)


ADAPTERHUB = AdapterHubForm(
    roles={
        "down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias", "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias", "scale": "scaling",
    },
    options={"non_linearity": "activation", "scaling": "scaling", "dropout": "dropout"},
    values={
        "non_linearity": {
            "relu": "relu", "swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh", "tanh": "tanh", "sigmoid": "sigmoid", "leakyrelu": "leaky_relu",
            "mish": "mish", "linear": "identity",
        },
    },
    variants={
        "placement": {
            "houlsby": {"is_parallel": False, "mh_adapter": True, "output_adapter": True, "original_ln_before": False},
            "pfeiffer": {
                "is_parallel": False, "mh_adapter": False, "output_adapter": True, "original_ln_before": True,
                "residual_before_ln": True,
            },
            "parallel": {"is_parallel": True, "mh_adapter": False, "output_adapter": True},
        },
    },
    width=("reduction_factor", "reduction", "width", "down"),
    defaults={
        "original_ln_before": False, "is_parallel": False, "residual_before_ln": True, "scaling": 1.0, "dropout": 0.0,
    },
    allowed={
        "original_ln_after": (True,), "ln_before": (False,), "ln_after": (False,), "use_gating": (False,),
        "phm_layer": (False,), "inv_adapter": (None,), "cross_adapter": (False,), "stochastic_depth": (0.0,),
    },
    ignored=frozenset({
        "adapter_residual_before_ln", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity",
        "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "learn_phm", "phm_bias", "phm_c_init",
        "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule",
    }),
    layers=("leave_out", "layers"),
)  # fmt: skip


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="adapters",
        summary="Bottleneck adapters after the sub-layers (Houlsby, Pfeiffer) or parallel to the feed-forward",
        config=AdaptersConfig,
        paper="https://arxiv.org/abs/1902.00751",
        unmergeable=UNMERGEABLE,
        recipe={"learning_rate": 2e-3, "weight_decay": 0.0},
        sources="measured on a 135M Llama, 48 steps: held-out loss 2.07 before, 1.19 at 2e-3, 1.20 at 1e-3; 30 steps:"
        " 1.25 at 1e-3, 1.26 at 3e-3, 1.34 at 1e-4; within the range that Houlsby et al. sweep,"
        " https://arxiv.org/abs/1902.00751; larger bases need less (3e-4 at 7B, https://arxiv.org/abs/2304.01933),"
        " and so does parallel with a scaling of 4",
        kinds=("block",),
    )


@hookimpl
def inject(base: Base, config: AdaptersConfig) -> Mapping[str, Part]:
    blocks = choose_blocks(base, ROLES[config.placement], config.layers)
    whole = whole_parts(base, whole_sites(base, config.modules_to_save), "break")
    return {block.name: Bottleneck(block, config) for block in blocks} | whole


@hookimpl
def merge(site: Site, tensors: Mapping[str, Tensor], config: AdaptersConfig) -> Delta:
    raise NotMergeable(UNMERGEABLE, where=site.name)


@hookimpl
def foreign_form(target: str) -> AdapterHubForm | None:
    return ADAPTERHUB if target == "adapterhub" else None
