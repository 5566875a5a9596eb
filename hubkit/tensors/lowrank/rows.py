"""Which row of a batch has which mix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hubkit.compat.torch import total_changes
from hubkit.errors import HubkitError
from hubkit.tensors.lowrank.kernel import RowKernel, row_kernel

_needs_grad = attrgetter("requires_grad")
_BATCHES = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids")
_REPEATED: ContextVar[bool] = ContextVar("hubkit_repeated", default=False)


def row_count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The number of rows of the batch that a call brings; None where nothing says it."""
    given = [args[0] if args else None, *(kwargs.get(name) for name in _BATCHES)]
    return next((one.shape[0] for one in given if isinstance(one, Tensor) and one.dim() > 1), None)


@contextmanager
def repeated() -> Iterator[None]:
    """Inside, a row may have become several, one behind the other: the beams of a sample, or its several answers."""
    token = _REPEATED.set(True)
    try:
        yield
    finally:
        _REPEATED.reset(token)


class Rows:
    """The mixes of the rows of one batch.

    Args:
        mixes: for each row the number of its mix, from 0; None where the base alone answers.
    """

    def __init__(self, mixes: Sequence[int | None]) -> None:
        self.mixes = tuple(mixes)
        self.values: list[Tensor] = []
        """The frozen or trained values that rows are answered with."""
        self.state: object = None
        """The same object for as long as these are what they were; None while one of them is trained."""
        self.kernel: RowKernel | None = None
        """What steps of decoding are computed with, where `state` says that the values stand still."""
        self._seen: Any = None
        self._whole, self._counted, self._changes = True, True, 0
        self._places: dict[tuple[int, int], Tensor] = {}
        self._orders: dict[object, tuple[list[tuple[int | None, Tensor]], Tensor]] = {}

    def look(self) -> None:
        """Looks at `values`, once per forward: there are thousands of them.

        What trains them calls a forward with gradient first; until then it is enough to count changes in place.
        """
        if not (self._whole or torch.is_grad_enabled()):
            changes = total_changes(self.values) if self._counted else 0
            if changes != self._changes:
                self._changes, self.state = changes, object()
            return
        self._whole, self.kernel = torch.is_grad_enabled(), None
        if any(map(_needs_grad, self.values)):
            self.state = None  # fused optimizers change values and leave versions as they were
            return
        self._counted = not any(map(Tensor.is_inference, self.values))
        self._changes = total_changes(self.values) if self._counted else 0
        seen = self._changes, list(map(Tensor.data_ptr, self.values))
        if self.state is None or seen != self._seen:
            self._seen, self.state = seen, object()
        self.kernel = row_kernel()

    def forget(self) -> None:
        """Values were moved or cast: the next `look` compares all of them."""
        self._whole = True

    def require(self, rows: int) -> int:
        """How many rows of a batch of `rows` each entry stands for.

        Raises:
            HubkitError: ``HK-ROUTE`` for another number of rows; more of them are beams, which are known only inside
                ``generate``.
        """
        times, rest = divmod(rows, len(self.mixes))
        if rest or not times or (times > 1 and not _REPEATED.get()):
            raise HubkitError(
                "HK-ROUTE",
                "the route has another length than the batch",
                want=f"{rows} entries, one per row",
                have=str(len(self.mixes)),
                fix="one entry per row, None for the base alone",
            )
        return times

    def of(self, rows: int) -> list[int | None]:
        """The mix of each row of a batch of `rows`: repeated rows follow their sample."""
        times = self.require(rows)
        return list(self.mixes) if times == 1 else [mix for mix in self.mixes for _ in range(times)]

    def places(self, rows: int, tokens: int) -> Tensor:
        """The number of the mix of every token of `rows` rows, (tokens,), -1 for none; on the CPU."""
        key = (rows, tokens)
        if key not in self._places:
            each = tokens // rows
            of = [-1 if mix is None else mix for mix in self.of(rows)]
            self._places[key] = torch.tensor([mix for mix in of for _ in range(each)])
        return self._places[key]

    def spread(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`x` and `y` with all rows, where the base computes one for the whole batch (positions, say)."""
        count = len(self.mixes)
        if y.shape[0] == 1 and count > 1:
            y = y.expand(count, *y.shape[1:])
        return (x.expand(count, *x.shape[1:]) if x.shape[0] == 1 and count > 1 else x), y

    def parted(
        self, rows: int, acting: Iterable[int], device: torch.device
    ) -> tuple[list[tuple[int | None, Tensor]], Tensor]:
        """The rows of each mix in `acting`, then those of none of them; and how to put all in order again.

        Returns:
            ([(mix, (k,)), ...], (rows,)): what `Tensor.index_select` takes.
        """
        chosen = tuple(acting)
        key = (rows, chosen, device)
        if key not in self._orders:
            of = [mix if mix in chosen else None for mix in self.of(rows)]
            found = [(mix, [row for row, own in enumerate(of) if own == mix]) for mix in (*chosen, None)]
            order = torch.tensor([row for _, own in found for row in own], device=device)
            parts = [(mix, torch.tensor(own, device=device)) for mix, own in found if own]
            self._orders[key] = parts, torch.argsort(order)
        return self._orders[key]
