"""The hooks of one block of a live model: what a part there sees of a sub-layer, and what it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hubkit.tensors.base.blocks import Block

Act = Callable[[nn.Module, Tensor | None, Tensor], Tensor | None]


class BlockHooks:
    """The hooks of one block: the first keeps the residual stream, the second lets `act` change the output.

    What is kept is let go when the output comes, and each thread keeps its own.

    Args:
        act: (module, x, y) -> the new output, or None to leave it. Where the sub-layer gives a tuple, y is its first;
            x is None where the module was called by itself.
    """

    def __init__(self, block: Block, act: Act) -> None:
        assert block.module is not None
        assert block.residual is not None
        kept, argument = threading.local(), block.argument

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.x = [*args, *kwargs.values()][argument]

        def change(module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
            x, kept.x = getattr(kept, "x", None), None
            new = act(module, x, y[0] if isinstance(y, tuple) else y)
            return (new, *y[1:]) if isinstance(y, tuple) and new is not None else new

        # functions, not methods: copying the model would copy `kept`, which cannot be copied
        self.handles = (
            block.residual.register_forward_pre_hook(keep, with_kwargs=True),
            block.module.register_forward_hook(change),
        )

    def remove(self) -> None:
        """Takes both off."""
        for handle in self.handles:
            handle.remove()
