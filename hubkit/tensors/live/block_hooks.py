"""The hooks of one block of a live model: what a part there sees of a sub-layer, and what it changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hubkit.tensors.base.blocks import Block

Act = Callable[[nn.Module, Tensor | None, Tensor], Tensor | None]


def changed(block: Block, x: Tensor | None, output: Any, act: Callable[[Tensor], Tensor | None]) -> Any:
    """The output of a sub-layer's module, with what `act` makes of what is added to the residual stream.

    Args:
        x: the residual stream; None where it is not known.
        output: the module's own output, a tensor or several of which it is the first (routers give their scores, too);
            in the residual stream's shape or with its tokens in one row (experts).
        act: y -> the new y, or None to leave it; y is the output times the block's multiplier, in the shape of x.
    """
    own = output if isinstance(output, Tensor) else output[0]
    shaped = own if x is None else own.reshape(x.shape)
    factor = block.multiplier
    y = shaped if factor == 1 else shaped * factor
    new = act(y)
    if new is None:
        return output
    if factor != 1:
        new = shaped + (new - y) / factor  # so that adding nothing changes no bit
    new = new.reshape(own.shape)
    return new if isinstance(output, Tensor) else type(output)([new, *output[1:]])


class BlockHooks:
    """The hooks of one block: the first keeps the residual stream, the second lets `act` change the output.

    What is kept is let go when the output comes, and each thread keeps its own.

    Args:
        act: (module, x, y) -> what to add to x in place of y, or None to leave it, see `changed`; x is None where the
            module was called by itself.
    """

    def __init__(self, block: Block, act: Act) -> None:
        assert block.module is not None
        assert block.residual is not None
        kept, argument = threading.local(), block.argument

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.x = [*args, *kwargs.values()][argument]

        def change(module: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
            x, kept.x = getattr(kept, "x", None), None
            return changed(block, x, y, lambda y: act(module, x, y))

        # functions, not methods: copying the model would copy `kept`, which cannot be copied
        self.handles = (
            block.residual.register_forward_pre_hook(keep, with_kwargs=True),
            block.module.register_forward_hook(change),
        )

    def remove(self) -> None:
        """Takes both off."""
        for handle in self.handles:
            handle.remove()
