"""Packing: the rows of a micro-batch one after the other in a single row, without padding.

The loss is that of the same rows padded: each sees itself alone and counts its own positions. Architectures differ in
how they know where a row begins (a mask made of positions, or not at all: state spaces, positions made inside), so it
is tried on the model before the first step, and refused where rows see each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.device import forked_rng
from hubkit.training.rows.batching import collate, packed
from hubkit.training.rows.encode import Row

TRIED = 48
"""Tokens of each row that is tried."""
SLACK = 8.0
"""How often the rounding that padding alone brings may be exceeded."""


def require_packing(model: nn.Module, step: Callable[[nn.Module, Mapping[str, Tensor]], Tensor], row: Row) -> None:
    """Refuses a model that mixes packed rows: the loss of a row must not depend on what is packed before it.

    The row's first `TRIED` tokens, all of them targets, are run alone, padded, behind a shorter beginning of themselves
    and behind that beginning reversed. A row that sees another, or whose positions go on from it, has another loss.

    Args:
        model: in training mode, without a cache; looked at in evaluation mode.
        step: the method's train step.
        row: any training row.

    Raises:
        HubkitError: ``HK-OPTIONS``.
    """
    ids = list(row.ids[:TRIED])
    before = ids[: max(2, len(ids) // 2)]
    tried, silent = Row(ids, [-100, *ids[1:]]), [-100] * len(before)
    others = [Row(before, silent), Row(before[::-1], silent)]
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), forked_rng(device):
            alone, padded, *behind = (
                float(step(model, batch))
                for batch in (
                    collate([tried], device),
                    collate([tried, Row([*ids, *ids], [-100] * 2 * len(ids))], device),
                    *(packed([other, tried], device) for other in others),
                )
            )
    except (RuntimeError, TypeError, ValueError) as error:  # what a model says of rows that it was not made for
        raise _refused(str(error)) from None
    finally:
        for module, mode in modes:
            module.training = mode
    # half of the digits of the base's dtype, as a loss is a mean of many rounded numbers; models make it in float32
    digits = max(torch.finfo(dtype).eps for dtype in (_dtype(model), torch.float32))
    rounding = math.sqrt(digits) / 8 * max(1.0, abs(alone))
    allowed = max(SLACK * abs(padded - alone), rounding)
    if not all(abs(loss - alone) <= allowed for loss in behind):
        raise _refused(f"the loss of a row alone is {alone:.4f}, behind others {behind[0]:.4f} and {behind[1]:.4f}")


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _refused(have: Any) -> HubkitError:
    return HubkitError(
        "HK-OPTIONS",
        "this base, or this method on it, does not keep packed rows apart",
        want="each row as if alone",
        have=str(have).splitlines()[0][:200],
        fix="train without --packing",
        status=USAGE,
    )


def packable(rows: Sequence[Row]) -> Row:
    """The row to try: one with enough tokens to see a difference by, where there is one."""
    return next((row for row in rows if len(row.ids) >= TRIED), max(rows, key=lambda row: len(row.ids)))
