"""Prefix tuning: Optimizing Continuous Prompts for Generation, Li and Liang 2021, https://arxiv.org/abs/2101.00190

    attention(q, [P_k; K], [P_v; V])        P_k, P_v (n, kv_heads, head_dim), learned, one pair per layer

P_k stands after rotary embedding, and the text's positions begin at n, as in PEFT. The paper trains P = MLP(P') and
keeps P alone (`prefix_projection`); starting from what the base makes of a real text needs no MLP to be stable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hubkit.methods.api import KV, Base, HubkitError, MethodInfo, PeftForm, Site, hookimpl

STD = {"small": 0.02, "gaussian": 1.0, "zero": 0.0}
"""Of random starting values."""


@dataclass(frozen=True)
class PrefixConfig:
    """Configuration of prefix tuning.

    Args:
        num_virtual_tokens: n, the length of the prefix.
        init_text: a text whose keys and values the prefix starts from, cut or repeated to n tokens; empty: see `init`.
        init: what it starts from without a text: vocabulary (the keys and values of tokens drawn from it), small
            (N(0, 0.02²), next to no keys and values at all), gaussian (N(0, 1)) or zero.
        prefix_projection: train the prefix as the output of a two-layer perceptron, which is folded when saved.
        encoder_hidden_size: width of that perceptron.
    """

    num_virtual_tokens: int = 20
    init_text: str = ""
    init: Literal["vocabulary", "small", "gaussian", "zero"] = "vocabulary"
    prefix_projection: bool = False
    encoder_hidden_size: int = 512

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1 or self.encoder_hidden_size < 1:
            have = f"{self.num_virtual_tokens} tokens, width {self.encoder_hidden_size}"
            raise HubkitError("HK-CONFIG", "out of range", want="at least 1", have=have)
        if self.init_text and self.prefix_projection:
            raise HubkitError(
                "HK-CONFIG",
                "a perceptron cannot start from the keys and values of a text",
                have="init_text and prefix_projection",
                fix="leave one of them out",
            )


class Perceptron(nn.Module):
    """``tanh(P' W₁ᵀ + b₁) W₂ᵀ + b₂``, P' (n, kv_heads · head_dim): the paper's reparametrization."""

    def __init__(self, length: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(length, width))
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, out)

    def forward(self) -> Tensor:
        made: Tensor = self.up(torch.tanh(self.down(self.start)))
        return made

    def reset(self, generator: torch.Generator) -> None:
        """As PEFT's: an embedding and two linear layers as torch makes them."""
        nn.init.normal_(self.start, generator=generator)
        for layer in (self.down, self.up):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


class Prefix(KV):
    """One prefix: a row per virtual token, layer by layer its keys, then its values."""

    def __init__(self, base: Base, config: PrefixConfig) -> None:
        super().__init__(base, config.num_virtual_tokens)
        layers, _, heads, length, size = self.shape
        self.config = config
        self.prefix: nn.Parameter | None = nn.Parameter(torch.empty(length, layers * 2 * heads * size))
        self.perceptron: Perceptron | None = None

    def forward(self) -> Tensor:
        layers, _, heads, length, size = self.shape
        return self.rows().view(length, layers, 2, heads, size).permute(1, 2, 3, 0, 4)

    def rows(self) -> Tensor:
        """(n, layers · 2 · kv_heads · head_dim)."""
        if self.perceptron is not None:
            made: Tensor = self.perceptron()
            return made
        assert self.prefix is not None
        return self.prefix

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        assert self.prefix is not None
        _, _, heads, length, size = self.shape
        if self.config.prefix_projection:
            made = Perceptron(length, heads * size, self.config.encoder_hidden_size, self.prefix.shape[1])
            self.perceptron = made.to(self.prefix.dtype)
            made.reset(generator)
            self.prefix = None
        elif self.config.init_text:
            self._start(base, base.token_ids(self.config.init_text, length))
        elif self.config.init == "vocabulary":
            self._start(base, torch.randint(0, base.site("tokens").shape[1], (length,), generator=generator))
        else:
            nn.init.normal_(self.prefix, std=STD[self.config.init], generator=generator)

    def _start(self, base: Base, ids: Tensor) -> None:
        """Takes over what the base makes of tokens."""
        assert self.prefix is not None
        self.prefix.copy_(base.keys_values(ids).permute(3, 0, 1, 2, 4).reshape(self.prefix.shape))

    def values(self) -> Mapping[str, Tensor]:
        return {"prefix": self.rows()}

    def settle(self) -> None:
        if self.perceptron is not None:
            rows = self.rows().detach()
            self.perceptron = None
            self.prefix = nn.Parameter(rows)


PEFT = PeftForm(
    peft_type="PREFIX_TUNING",
    roles={},
    options={"num_virtual_tokens": "num_virtual_tokens"},
    targets="",
    allowed={
        "modules_to_save": (None,),
        "num_transformer_submodules": (1, None),
        "prefix_projection": (False, True),
    },
    ignored=frozenset({"encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers", "token_dim"}),
    whole={"prompt_embeddings": ("kv", "prefix")},
)


@hookimpl
def describe() -> MethodInfo:
    return MethodInfo(
        name="prefix",
        summary="Prefix tuning: learned keys and values in front of every attention's own",
        config=PrefixConfig,
        paper="https://arxiv.org/abs/2101.00190",
        identity=False,
        unmergeable="a prefix adds keys and values that attention sees: no weight of the base holds them",
        recipe={"learning_rate": 2e-2, "weight_decay": 0.0},
        sources="keys and values of real tokens are the better start even where they have nothing to do with the"
        " task: https://arxiv.org/abs/2101.00190 §7.4; PEFT's method comparison finds the same with a text, at"
        " 5e-3 over 5000 steps; measured on a 135M Llama, 24 steps: held-out loss 2.05 before, 1.38 at 2e-2;"
        " from a text 2.04 and 1.37; from zeros 2.07 and 1.44 (1.36 at 0.1); from N(0, 1), PEFT's default,"
        " 12.1 and 3.30",
        kinds=("kv",),
    )


@hookimpl
def inject(base: Base, config: PrefixConfig) -> Mapping[str, Prefix]:
    return {"kv": Prefix(base, config)}


@hookimpl
def foreign_form(target: str) -> PeftForm | None:
    return PEFT if target == "peft" else None
