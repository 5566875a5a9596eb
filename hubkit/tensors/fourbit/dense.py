"""A quantized layer that multiplies by floats for a while."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.compat.torch import own_forward, set_forward


class Dense:
    """The forward of a quantized layer that multiplies by a weight of floats instead, until it is taken out again.

    Args:
        layer: that layer.
        weight: (out, in).
    """

    def __init__(self, layer: nn.Module, weight: Tensor) -> None:
        self._layer: Any = layer
        self._weight = weight
        self._before = own_forward(layer)
        set_forward(layer, self)

    def undo(self) -> None:
        """Gives the layer the forward back that it had."""
        set_forward(self._layer, self._before)

    def __call__(self, x: Tensor) -> Tensor:
        """As the layer's forward, in the dtype of `x`."""
        bias = None if self._layer.bias is None else self._layer.bias.to(x.dtype)
        return F.linear(x, self._weight.to(x.device, x.dtype), bias)
