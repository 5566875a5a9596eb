"""What sites that are called with the same input share: computed at the first one's call, handed out at the others'."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from hubkit.compat.torch import changes_of


class SharedInput:
    """Keeps what one call computed for its siblings, until they are called.

    It is found again by the identity and version of the input, so a site that is called with something else, a second
    thread or a recomputation computes its own; nothing depends on the order of calls.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], Any, dict[str, Tensor], Any] | None = None

    def take(self, name: str, x: Tensor, state: object) -> tuple[Tensor, Any] | None:
        """The share of site `name`, once, and what was kept with it; None where it has to be computed.

        Args:
            x: the input.
            state: how it was computed; another way's result is none.
        """
        last = self._last
        if last is None or last[0]() is not x or last[1] != (torch.is_grad_enabled(), state, changes_of(x)):
            return None
        mine = last[2].pop(name, None)
        return None if mine is None else (mine, last[3])

    def keep(self, name: str, x: Tensor, state: object, made: dict[str, Tensor], beside: Any) -> Tensor:
        """Keeps `made`, site -> result, with `beside`, and hands out the share of site `name`."""
        mine = made.pop(name)
        if made:
            self._last = (weakref.ref(x), (torch.is_grad_enabled(), state, changes_of(x)), made, beside)
        return mine
