"""Values on the meta device, for models that look at some: a dispatch mode of torch, as it is from 2.6 to 2.13.

Tensors there have shapes and no values, and a model that asks for one ("is this row packed?", "which tokens go to
expert 7?") stops. What such a model asks for follows from whole numbers and truths: positions, masks, and which experts
were chosen. Those are small, so they are computed beside, on the CPU; numbers of the model itself are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
LARGEST = 1 << 24
"""Elements of a tensor that is followed: a mask of 4,096 x 4,096. Of other numbers than whole ones a 64th."""


class Followed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it tensors on the meta device have values where these follow from shapes and given values alone.

    Where a model chooses by numbers that are not there (``topk`` of what a router says), it is taken to choose evenly:
    token t takes the choices t·k, t·k+1, ... in turn, so that each expert gets as many tokens. What is asked of numbers
    that are not there otherwise is an error, as it is outside.

    `torch.utils._python_dispatch` has no public name; `torch.overrides.TorchFunctionMode`, which has one, does not see
    what operations are made of. The values of a storage are kept beside it, so views and changes in place follow by
    themselves; the mode holds every storage it knows, so that no other one gets its address.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, tuple[Any, Any]] = {}

    def value_of(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor; None where they are not known. Of one that is no meta tensor: itself."""
        if tensor.device.type != "meta":
            return tensor
        storage = tensor.untyped_storage()
        if (found := self._known.get(storage._cdata)) is None:
            return None
        made = torch.empty(0, dtype=tensor.dtype)
        return made.set_(found[1], tensor.storage_offset(), tensor.shape, tensor.stride())

    def give(self, tensor: Tensor, values: Tensor) -> Tensor:
        """Says what the values of a meta tensor are; returns it."""
        own = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        own.copy_(values)
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage, own.untyped_storage()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = list(_tensors((args, kwargs.values())))
        meta = any(one.device.type == "meta" for one in flat)
        if not meta and torch.device(kwargs.get("device") or "cpu").type != "meta":
            return func(*args, **kwargs)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], self._numbered(args[1]), *args[2:])
        if _asks(func, kwargs) and (asked := self._valued(func, args, kwargs)) is not None:
            return asked
        try:
            made = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            if (stand_in := _STAND_INS.get(func)) is not None:
                return stand_in(*args)
            if (asked := self._valued(func, args, kwargs)) is None:
                raise
            return tree_map(lambda one: self._on_meta(one) if isinstance(one, Tensor) else one, asked)
        self._follow(func, args, kwargs, made)
        return made

    def _valued(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation gives on the values of its arguments; None where one is not known."""
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn or not all(self._knows(one) for one in _tensors((args, kwargs.values()))):
            return None
        own, named = tree_map(lambda one: self.value_of(one) if isinstance(one, Tensor) else one, (args, kwargs))
        if named.get("device") is not None:
            named = {**named, "device": torch.device("cpu")}
        try:
            return func(*own, **named)
        except (NotImplementedError, RuntimeError):  # something that the CPU does not do with whole numbers
            return None

    def _knows(self, tensor: Tensor) -> bool:
        return tensor.device.type != "meta" or tensor.untyped_storage()._cdata in self._known

    def _follow(self, func: Any, args: Any, kwargs: Any, made: Any) -> None:
        """Notes the values of what was made, or changed in place, where it is small whole numbers or truths."""
        outputs = list(_tensors((made,)))
        followed = [one for one in outputs if _small(one)]
        if not func._schema.is_mutable and all(self._knows(one) for one in followed):
            return  # views of what is known, or nothing to know
        if func in _CHOOSING and args[0].dtype.is_floating_point:
            number = _CHOOSING[func]
            dim = kwargs.get("dim", args[number] if len(args) > number else -1)
            for one in followed:
                if not one.dtype.is_floating_point:
                    self.give(one, _evenly(one, args[0], dim))
            return
        values = self._valued(func, args, kwargs)
        if func._schema.is_mutable:
            if values is None:  # changed by what is not known
                for one in outputs:
                    self._known.pop(one.untyped_storage()._cdata, None)
            return
        for one, value in zip(outputs, _tensors((values,)), strict=False):
            if _small(one) and one.shape == value.shape:
                self.give(one, torch.zeros_like(value) if func in _EMPTY else value)

    def _numbered(self, indices: Any) -> Any:
        """Indices of which truths are the places where they hold: how many those are is asked."""
        found: list[Any] = []
        for one in indices:
            truths = one is not None and one.dtype in (torch.bool, torch.uint8)
            value = self.value_of(one) if truths else None
            found += [one] if value is None else [self._on_meta(part) for part in value.nonzero(as_tuple=True)]
        return found

    def _on_meta(self, values: Tensor) -> Tensor:
        made = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
        return self.give(made, values) if _small(made) else made


class Multiplied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it products of matrices on the meta device are counted, by their sizes.

    ``torch.utils.flop_counter`` is public and counts the same, but says no sizes, and of a forward pass not what its
    backward will multiply: as much again for each side that has a gradient.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[tuple[int, int, int], tuple[int, int]] = {}
        """(tokens, in, out) -> operations of the forward pass, and of the backward pass."""

    def note(self, size: tuple[int, int, int], times: int, gradients: int) -> None:
        """Notes `times` products of such a size."""
        count = 2 * times * size[0] * size[1] * size[2]
        forward, backward = self.found.get(size, (0, 0))
        self.found[size] = forward + count, backward + gradients * count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (first := _PRODUCTS.get(func)) is not None:
            left, right = args[first], args[first + 1]
            if left.device.type == "meta":
                both = right.dim() == left.dim() == 3
                times = left.shape[0] if both else 1
                size = left.shape[-2], left.shape[-1], right.shape[-1]
                self.note(size, times, left.requires_grad + right.requires_grad)
        return func(*args, **(kwargs or {}))


def fuses_attention(
    device: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
    scale: float | None, grouped: bool,
) -> bool:  # fmt: skip
    """Whether torch has a fused kernel for an attention on a device of kind `device`.

    ``torch._fused_sdp_choice`` is what ``scaled_dot_product_attention`` itself asks; by a public name one can only
    forbid kernels (`torch.nn.attention.sdpa_kernel`). It looks at shapes and layouts, so tensors without contents do.
    Of a device that is not here it is taken that it has one.
    """
    if device != "cpu":
        return True
    made = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype) for one in (query, key, value)]
    for one in made:
        one.requires_grad_()
    hidden = None if mask is None else torch.empty_strided(mask.shape, mask.stride(), dtype=mask.dtype)
    ask: Any = torch._fused_sdp_choice
    choice: int = ask(*made, hidden, dropout, causal, scale=scale, enable_gqa=grouped)
    return choice != 0


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
    scale: float | None, grouped: bool,
) -> Tensor:  # fmt: skip
    """The attention that torch takes where it has no kernel, ``aten::_scaled_dot_product_attention_math``."""
    math = torch.ops.aten._scaled_dot_product_attention_math
    out: Tensor = math(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped)[0]
    return out


def _tensors(found: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in arguments or results of an operation, in order."""
    for one in found:
        if isinstance(one, Tensor):
            yield one
        elif not isinstance(one, str) and isinstance(one, Iterable):
            yield from _tensors(one)


def _small(tensor: Tensor) -> bool:
    numbers = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return tensor.device.type == "meta" and tensor.numel() <= (LARGEST >> 6 if numbers else LARGEST)


def _asks(func: Any, kwargs: Any) -> bool:
    """Whether an operation wants values: one as a number of Python, or all on the CPU."""
    wanted = kwargs.get("device")
    copied = func is aten._to_copy.default and wanted is not None and torch.device(wanted).type == "cpu"
    return copied or func is aten._local_scalar_dense.default


def _evenly(chosen: Tensor, among: Tensor, dim: int | None) -> Tensor:
    """Places along `dim` of `among`, each as often: within a line they differ, from line to line they go on."""
    choices = among.numel() if dim is None or not among.dim() else among.shape[dim]
    numbers = torch.arange(chosen.numel()) % choices
    if dim is None or chosen.dim() != among.dim() or not chosen.dim():
        return numbers.view(chosen.shape)
    return numbers.view(chosen.transpose(dim, -1).shape).transpose(dim, -1)


def _grouped(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The product of tokens that lie by expert: on the meta device torch takes it in bfloat16 alone."""
    return x.new_empty((*x.shape[:-1], weight.shape[-1]))


_EMPTY = (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default)
_CHOOSING = {
    aten.topk.default: 2,
    aten.sort.default: 1,
    aten.sort.stable: 2,
    aten.argsort.default: 1,
    aten.max.dim: 1,
    aten.min.dim: 1,
    aten.argmax.default: 1,
    aten.argmin.default: 1,
}
"""Operations that choose among numbers -> at which of their arguments it is said along which dimension."""
_STAND_INS: dict[Any, Callable[..., Tensor]] = (
    {torch.ops.aten._grouped_mm.default: _grouped} if hasattr(torch.ops.aten, "_grouped_mm") else {}
)
_PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
"""Products of matrices -> which argument is the left one."""
if hasattr(aten, "_grouped_mm"):
    _PRODUCTS[aten._grouped_mm.default] = 0
