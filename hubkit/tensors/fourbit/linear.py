"""Linear layers whose frozen weight is packed in 4 bits: decoded to multiply, decoded again in the backward pass.

Nothing decoded outlives the product, so memory is that of the packed weights and one decoded tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hubkit.compat.bitsandbytes import decoded_facts, packed_tensors
from hubkit.compat.torch import Observed, own_forward, parameters_of, set_forward
from hubkit.errors import HubkitError
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.divided import BYTES, collected, gathered, hollowed, parts_of
from hubkit.tensors.fourbit.nf4 import PackedWeight, packed_on, quantize, unpacked

_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class QuantLinear(Observed):
    """``y = x Wᵀ + b`` with W packed; in checkpoints its tensors have bitsandbytes' names.

    It is empty until `fill` is called.

    Args:
        in_features, out_features: of the weight, (out, in).
        bias: a parameter or None.
        transposed: the layer it stands for stored its weight (in, out).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None = None, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self._packed: PackedWeight | None = None
        self.register_buffer("weight", torch.empty(0, 0, device="cpu"), persistent=False)
        for name in (*_STATISTICS, "quant_state"):
            self.register_buffer(name, None, persistent=False)

    @property
    def packed(self) -> PackedWeight | None:
        """The weight; None before `fill`. Where it is divided among processes and not gathered, its facts alone."""
        if self._packed is None or not self.divided:
            return self._packed
        return gathered(self._packed, self.divided)

    @property
    def divided(self) -> dict[str, Tensor]:
        """Field of the weight -> its bytes as a parameter; empty but after `divide`."""
        return parts_of(parameters_of(self))

    def divide(self) -> None:
        """Makes the packed weight parameters of bytes, so that FSDP2 divides it among processes; it cannot be undone.

        FSDP2 divides parameters, not buffers, and leaves those of integers in their dtype.
        """
        if self._packed is None or self.divided:
            return
        self._packed, parts = hollowed(self._packed)
        for field, part in parts.items():
            self.register_parameter(BYTES + field, nn.Parameter(part, requires_grad=False))
        self.weight = torch.empty(0, 0, device="cpu")
        for name in (*_STATISTICS, "quant_state"):
            setattr(self, name, None)

    def whole(self) -> PackedWeight | None:
        """As `packed`; what is divided and not gathered is collected from all processes (a collective then)."""
        if self._packed is None or not self.divided:
            return self._packed
        return gathered(self._packed, {field: collected(part.detach()) for field, part in self.divided.items()})

    def describe(self, hollow: PackedWeight) -> None:
        """Takes over the facts and tables of a weight whose bytes others put into `divided`."""
        assert self.divided, "a layer that is not divided is filled"
        self._packed = hollow

    def fill(self, packed: PackedWeight) -> None:
        """Takes over a packed weight.

        Raises:
            HubkitError: ``HK-SHAPE``.
        """
        shape = (self.out_features, self.in_features)
        if packed.shape != shape:
            raise HubkitError(
                "HK-SHAPE", "the packed weight is of another shape", want=str(shape), have=str(packed.shape)
            )
        self._packed = packed
        for key, tensor in packed.tensors().items():
            setattr(self, _attribute(key), tensor)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out, in), in `dtype` or that of the layer."""
        assert self.packed is not None, "a layer without a weight"
        return dequantize(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _multiplied(x, self.bias, self.decode)

    def extra_repr(self) -> str:
        codec = self.packed.codec if self.packed else "empty"
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={codec}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None and not self.divided:
            for key in self.packed.tensors():
                destination[f"{prefix}weight.{key}".rstrip(".")] = getattr(self, _attribute(key))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        stem = f"{prefix}weight"
        found = {key[len(stem) + 1 :]: value for key, value in state_dict.items() if _below(key, stem)}
        if found.keys() == {""} and self.packed is None:
            found = {}  # transformers before 5 offers an empty layer the weight alone; it is filled afterwards
        if found:
            self.fill(unpacked(found, stem))
        elif strict:
            missing.append(stem)
        others = {key: value for key, value in state_dict.items() if not _below(key, stem)}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, *rest)

    def _moving(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Moves everything; casts what a layer computes in, never the statistics."""
        bias = self.bias
        return lambda t: fn(t) if t is bias else _moved(fn, t)

    def _moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.packed is not None and not self.divided:
            dtype = fn(torch.empty(0, dtype=self.packed.dtype, device=self.packed.codes.device)).dtype
            self.fill(_of_buffers(self, self.packed, dtype))


Decode = Callable[..., Tensor]
"""Gives the weight, (out, in), in a dtype or its own."""


def _multiplied(x: Tensor, bias: Tensor | None, decode: Decode) -> Tensor:
    """``x Wᵀ + b``, for which W is decoded, and decoded again in the backward pass."""
    if torch.compiler.is_compiling():  # of `_Product` a compiler keeps the decoded weight: it sees the same twice
        plain: Tensor = checkpoint(
            lambda x: F.linear(x, decode(x.dtype), bias), x, use_reentrant=False, preserve_rng_state=False
        )
        return plain
    y: Tensor = _Product.apply(x, bias, decode)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """x (..., in), bias (out,) or None -> (..., out). The weight is frozen; only what is small is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decode: Decode) -> Tensor:
        ctx.decode, ctx.dtype = decode, x.dtype
        return F.linear(x, decode(x.dtype), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_x = (grad @ ctx.decode(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


LINEAR = ("FalconLinear",)
"""Subclasses of `nn.Linear` that are as plain, their product only written otherwise."""


def quantizable(module: nn.Module) -> bool:
    """Whether `module` is a plain linear layer of floats with a forward of its own, whose weight nothing else reads."""
    name = type(module).__name__
    plain = type(module) is nn.Linear or name in LINEAR or (name == "Conv1D" and hasattr(module, "nf"))
    return plain and own_forward(module) is None and not hasattr(module, "parametrizations")


def shell(module: nn.Module) -> QuantLinear:
    """An empty quantized layer in place of the linear layer `module` (on any device, the meta device too)."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    transposed = type(module).__name__ == "Conv1D"
    rows, columns = int(weight.shape[0]), int(weight.shape[1])
    out_features, in_features = (columns, rows) if transposed else (rows, columns)
    made = QuantLinear(in_features, out_features, bias if isinstance(bias, nn.Parameter) else None, transposed)
    made.training = module.training
    return made


class Swapped:
    """The forward of a live linear layer that keeps its own weight beside one in 4 bits, and multiplies by the latter.

    What is packed follows the layer to another device or dtype.

    Args:
        layer: that layer.
        packed: what its weight was quantized to.
    """

    def __init__(self, layer: nn.Module, packed: PackedWeight) -> None:
        self._layer: Any = layer
        self._packed = packed

    @property
    def packed(self) -> PackedWeight:
        """The weight in 4 bits, where the layer's own is, and decoded to its dtype."""
        weight: Tensor = self._layer.weight
        if self._packed.codes.device != weight.device:
            self._packed = packed_on(self._packed, weight.device)
        if self._packed.dtype != weight.dtype:
            self._packed = replace(self._packed, dtype=weight.dtype)
        return self._packed

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out, in), in `dtype` or that of the layer."""
        return dequantize(self.packed, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """As the layer's forward."""
        return _multiplied(x, self._layer.bias, self.decode)


class Swap:
    """A live linear layer made to compute in 4 bits: the same object, so hooks and references stay.

    Its own weight stays its parameter, and what checkpoints and fingerprints see. `undo` ends it.

    Raises:
        HubkitError: ``HK-NAN``, ``HK-DTYPE`` for a weight that cannot be quantized; nothing has changed then.
    """

    def __init__(self, layer: nn.Module) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        packed = quantize(weight.t() if type(layer).__name__ == "Conv1D" else weight)
        self._layer = layer
        set_forward(layer, Swapped(layer, packed))

    def undo(self) -> None:
        """Gives the layer its forward back."""
        set_forward(self._layer, None)


def swapped(module: nn.Module) -> Swapped | None:
    """What `Swap` has put into a live layer."""
    found = own_forward(module)
    return found if isinstance(found, Swapped) else None


_KEPT: WeakKeyDictionary[nn.Module, PackedWeight] = WeakKeyDictionary()


def keep_packed(module: nn.Module | None) -> None:
    """Keeps what a layer of bitsandbytes holds on a CPU: its first forward there may rearrange that, and lose bits.

    Nothing is copied: what is kept is what the layer lets go of. One that is rearranged already is left alone.
    """
    if module is None or isinstance(module, QuantLinear) or swapped(module) is not None:
        return
    with contextlib.suppress(HubkitError):
        packed = packed_of(module)
        if packed is not None and packed.codes.device.type == "cpu":
            _KEPT[module] = packed


def packed_of(module: nn.Module | None) -> PackedWeight | None:
    """The packed weight of a quantized layer, hubkit's or bitsandbytes'; None for any other module.

    Raises:
        HubkitError: ``HK-QUANT-STATE``: see `hubkit.compat.bitsandbytes.packed_tensors`; not for a layer that
            `keep_packed` was told of in time.
    """
    if module is None:
        return None
    if (own := module if isinstance(module, QuantLinear) else swapped(module)) is not None:
        return own.packed
    try:
        theirs = packed_tensors(module)
    except HubkitError:
        if (kept := _KEPT.get(module)) is None:
            raise
        return packed_on(kept, module.get_parameter("weight").device)
    return None if theirs is None else unpacked(theirs, type(module).__name__)


def packed_whole(module: nn.Module | None) -> PackedWeight | None:
    """As `packed_of`; a weight that is divided among processes and not gathered is collected (a collective then)."""
    return module.whole() if isinstance(module, QuantLinear) else packed_of(module)


def packed_facts(module: nn.Module) -> tuple[tuple[int, int], torch.dtype, bool] | None:
    """(out, in), dtype of the decoded weight, whether the layer it stands for stored (in, out); None for other modules.

    Never refused: layers of bitsandbytes that cannot be decoded can still be acted at.
    """
    if isinstance(module, QuantLinear):
        dtype, transposed = module.packed.dtype if module.packed else torch.get_default_dtype(), module.transposed
    elif (own := swapped(module)) is not None:
        rows, columns = own.packed.shape
        return (rows, columns), own.packed.dtype, type(module).__name__ == "Conv1D"
    elif isinstance(module, nn.Linear) and (theirs := decoded_facts(module)) is not None:
        dtype, transposed = theirs
    else:
        return None
    return (int(module.out_features), int(module.in_features)), dtype, transposed


def _of_buffers(layer: QuantLinear, packed: PackedWeight, dtype: torch.dtype) -> PackedWeight:
    found = {key: getattr(layer, _attribute(key)) for key in packed.tensors()}
    made = replace(packed, codes=found[""], absmax=found["absmax"], levels=found["quant_map"], dtype=dtype)
    if packed.nested_map is None:
        return made
    return replace(made, nested_absmax=found["nested_absmax"], nested_map=found["nested_quant_map"])


def _attribute(key: str) -> str:
    """The buffer that holds the tensor stored as ``weight.<key>``."""
    return key.partition(".")[0] or "weight"


def _below(key: str, stem: str) -> bool:
    return key == stem or key.startswith(stem + ".")


def _moved(fn: Callable[[Tensor], Tensor], tensor: Any) -> Tensor:
    """`tensor` where `fn` puts it, in its own dtype."""
    moved: Tensor = tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)
    return moved
