"""Options that every method with a pair of factors B·A has, spelled once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hubkit.errors import HubkitError
from hubkit.methods.patterns import pattern_value
from hubkit.tensors.layers import layer_numbers

if TYPE_CHECKING:
    from hubkit.tensors.base import Base
    from hubkit.tensors.site import Site


@dataclass(frozen=True)
class LowRankConfig:
    """Configuration shared by methods with factors A (r, in) and B (out, r).

    Args:
        targets: ``all-linear`` (all but the output head), an expression, or names of modules.
        rank: r.
        alpha: numerator of the scale.
        dropout: probability with which components of x are dropped before A, in training only.
        rslora: scale by 1/sqrt(r) instead of 1/r.
        rank_pattern: module expression -> r, where it differs.
        alpha_pattern: module expression -> alpha, where it differs.
        layers: numbers of the layers to act in, ``0-11`` or ``0,4,8-11``; all when empty.
        lora_plus_ratio: learning rate of B as a multiple of that of A (LoRA+, https://arxiv.org/abs/2402.12354).
    """

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: str | tuple[int, ...] = ()
    lora_plus_ratio: float = 1.0

    def __post_init__(self) -> None:
        wrong = [f"rank {r}" for r in (self.rank, *self.rank_pattern.values()) if r < 1]
        wrong += [] if 0 <= self.dropout < 1 else [f"dropout {self.dropout}"]
        wrong += [] if self.lora_plus_ratio > 0 else [f"a ratio of {self.lora_plus_ratio}"]
        if wrong:
            want = "rank >= 1, 0 <= dropout < 1, a ratio of learning rates above 0"
            raise HubkitError("HK-CONFIG", "out of range", want=want, have=wrong)
        if self.layers:
            layer_numbers(self.layers)

    def rank_at(self, site: str) -> int:
        """r of one site."""
        return pattern_value(self.rank_pattern, site, self.rank)

    def scale_at(self, site: str) -> float:
        """s of one site."""
        rank, alpha = self.rank_at(site), pattern_value(self.alpha_pattern, site, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def sites(self, base: Base, kinds: str | Sequence[str]) -> list[Site]:
        """The sites of `base` that targets and layers choose; see `Base.match`."""
        return base.match(self.targets, kinds, layers=self.layers or None)
