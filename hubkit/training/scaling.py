"""Scaling the loss where a model computes in float16, whose smallest gradients would be zeros otherwise.

Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.2. The factor is a power of two, so nothing but
the range of what passes backward changes; it is halved, and the step computed again, where a gradient overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FIRST, LEAST, MOST = 2.0**16, 1.0, 2.0**24
PATIENCE = 2000
"""Steps without an overflow after which twice the factor is tried, as torch's own GradScaler does."""


class LossScale:
    """What the loss is multiplied by before the backward pass: 1 for a model that has no float16.

    A part of the run's state, so that a resumed run goes on with the same factor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.wanted = any(p.dtype == torch.float16 for p in model.parameters())
        self.factor, self.calm = FIRST if self.wanted else 1.0, 0

    def overflowed(self) -> bool:
        """Halves the factor; False where it cannot be smaller, and the overflow is the gradient's own."""
        if self.factor <= LEAST:
            return False
        self.factor, self.calm = self.factor / 2, 0
        return True

    def held(self) -> None:
        """Counts a step without an overflow."""
        self.calm += 1
        if self.wanted and self.calm >= PATIENCE:
            self.factor, self.calm = min(2 * self.factor, MOST), 0

    def state(self) -> dict[str, Tensor]:
        """The state as a tensor, (2,); none where nothing is scaled."""
        return {"scale/loss": torch.tensor([self.factor, self.calm])} if self.wanted else {}

    def adopt(self, value: Tensor) -> None:
        """Takes over what `state` gave."""
        factor, calm = value.tolist()
        self.factor, self.calm = factor, int(calm)
