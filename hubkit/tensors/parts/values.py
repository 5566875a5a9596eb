"""Values of tensors on their way from files into parts: cast together, put in place, all of them finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.delta import accumulation_dtype
from hubkit.tensors.files.dtypes import DTYPE_NAMES


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuses the tensors of an adapter, (name, values), where one holds a NaN or an infinity.

    Raises:
        HubkitError: ``HK-NAN`` naming every such tensor.
    """
    bad = [name for name, value in tensors if not torch.isfinite(value).all()]
    if bad:
        raise HubkitError(
            "HK-NAN",
            f"{len(bad)} tensors of the adapter hold NaN or infinity",
            where=where,
            have=bad,
            fix="train again from the last good checkpoint, with a lower learning rate",
        )


def in_range(values: Tensor, where: str) -> Tensor:
    """`values` of a merged weight, all finite: what is not shows in the least or the largest of them.

    Raises:
        HubkitError: ``HK-NAN``.
    """
    if values.numel() and not all(map(math.isfinite, torch.stack(values.aminmax()).tolist())):
        raise HubkitError(
            "HK-NAN",
            f"the result leaves the range of {str(values.dtype).removeprefix('torch.')}",
            where=where,
            fix="--dtype float32",
        )
    return values


def target_dtype(rule: str | None, base: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """The dtype that a stored tensor is taken into memory in: see `hubkit.tensors.parts.adapter.Adapter.read`.

    Args:
        rule: ``base``, ``master`` or None.
        base: dtype of the base's weight at its site.
        stored: its own.
    """
    if rule is None or base not in DTYPE_NAMES or not base.is_floating_point:
        return stored
    return base if rule == "base" else accumulation_dtype(base)


def joined(values: list[Tensor]) -> Tensor:
    """All values one behind the other, 1-D: without a copy where they lie so in memory, as a file's tensors do."""
    first, total = values[0], sum(value.numel() for value in values)
    begins = {value.untyped_storage().data_ptr() for value in values}
    span = values[-1].data_ptr() + values[-1].nbytes - first.data_ptr()
    if len(begins) == 1 and span == total * first.itemsize and all(value.is_contiguous() for value in values):
        return first.as_strided((total,), (1,), first.storage_offset())
    return torch.cat([value.reshape(-1) for value in values])


def assign(part: nn.Module, role: str, parameter: nn.Parameter) -> None:
    """Puts a parameter in the place of the one of that role, which was made on the meta device."""
    holder = part
    if "." in role:
        owner, _, role = role.rpartition(".")
        holder = part.get_submodule(owner)
    holder.register_parameter(role, parameter)
