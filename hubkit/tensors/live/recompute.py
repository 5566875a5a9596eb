"""Gradient checkpointing: what is computed again in the backward pass is computed under the mix of its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.compat.transformers import checkpoint_of, set_checkpoint


class UnderItsMix:
    """Stands in front of the function with which transformers checkpoints a layer, whoever switched that on and how.

    Args:
        checkpoint: that function.
        active: the plan of the forward that is running.
        under: makes a plan the active one, inside a ``with``.
    """

    def __init__(
        self,
        checkpoint: Callable[..., Any],
        active: Callable[[], Any],
        under: Callable[[Any], AbstractContextManager[None]],
    ) -> None:
        self.checkpoint, self._active, self._under = checkpoint, active, under

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As the function's own. The first layer's input is made to require grad: reentrant checkpointing gives no
        gradient otherwise, and says so in a warning at most."""
        plan = self._active()

        def run(*inner: Any, **named: Any) -> Any:
            with self._under(plan):
                return layer(*inner, **named)

        if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and not args[0].requires_grad:
            args = (args[0].detach().requires_grad_(torch.is_grad_enabled()), *args[1:])
        return self.checkpoint(run, *args, **kwargs)


def checkpointing_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that can checkpoint."""
    return [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]


def stand_in(
    modules: list[nn.Module], active: Callable[[], Any], under: Callable[[Any], AbstractContextManager[None]]
) -> None:
    """Puts an `UnderItsMix` in front of the checkpointing of each module that has it switched on."""
    for module in modules:
        if module.gradient_checkpointing:
            own = checkpoint_of(module)
            if own is not None and not isinstance(own, UnderItsMix):
                set_checkpoint(module, UnderItsMix(own, active, under))


def step_aside(modules: list[nn.Module]) -> None:
    """Gives every module its own function back."""
    for module in modules:
        own = checkpoint_of(module)
        if isinstance(own, UnderItsMix):
            set_checkpoint(module, own.checkpoint)
