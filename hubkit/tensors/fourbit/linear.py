"""Linear layers whose frozen weight is packed in 4 bits: decoded to multiply, decoded again in the backward pass.

Nothing decoded outlives the product, so memory is that of the packed weights and one decoded tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hubkit.errors import HubkitError
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.nf4 import PackedWeight, quantize, unpacked

_STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


class QuantLinear(nn.Module):
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
        self.packed: PackedWeight | None = None
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        nothing._is_hf_initialized = self._is_hf_initialized = True  # type: ignore[attr-defined]
        self.register_buffer("weight", nothing, persistent=False)
        for name in (*_STATISTICS, "quant_state"):
            self.register_buffer(name, None, persistent=False)

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
        self.packed = packed
        for key, tensor in packed.tensors().items():
            setattr(self, _attribute(key), tensor)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, (out, in), in `dtype` or that of the layer."""
        assert self.packed is not None, "a layer without a weight"
        return dequantize(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if torch.compiler.is_compiling():  # of `_Product` a compiler keeps the decoded weight: it sees the same twice
            y = checkpoint(self._plain, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = _Product.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
        return y

    def _plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.decode(), self.bias)

    def extra_repr(self) -> str:
        codec = self.packed.codec if self.packed else "empty"
        return f"in_features={self.in_features}, out_features={self.out_features}, codec={codec}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Moves everything; casts what a layer computes in, never the statistics."""
        bias: Any = self.bias
        super()._apply(lambda t: fn(bias) if t is bias else _moved(fn, t), recurse)  # type: ignore[no-untyped-call]
        if self.packed is not None:
            dtype = fn(torch.empty(0, dtype=self.packed.dtype, device=self.packed.codes.device)).dtype
            self.fill(_of_buffers(self, self.packed, dtype))
        return self


class _Product(torch.autograd.Function):
    """x (..., in), bias (out,) or None -> (..., out). The weight is frozen; only what is small is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.decode(), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_x = (grad @ ctx.layer.decode(grad.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


def quantizable(module: nn.Module) -> bool:
    """Whether `module` is a plain linear layer of floats with a forward of its own, whose weight nothing else reads."""
    plain = type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))
    return plain and "forward" not in vars(module) and not hasattr(module, "parametrizations")


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


class Swap:
    """A live linear layer turned into a quantized one, in place: the same object, so hooks and references stay.

    Its own weight is kept aside and stays what checkpoints and fingerprints see; `undo` puts it back.
    """

    def __init__(self, module: nn.Module) -> None:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        packed = quantize(weight.t() if type(module).__name__ == "Conv1D" else weight)
        before = dict(vars(module))
        stand_in = shell(module)
        self._module, self._class, self._before = module, type(module), before
        kept = {name: before[name] for name in before if "hooks" in name}
        module.__class__ = Swapped
        vars(module).update({**vars(stand_in), **kept, "_original": [weight]})
        assert isinstance(module, Swapped)
        module.fill(packed)

    def undo(self) -> None:
        """Gives the layer its class and weight back, as they were; hooks registered meanwhile stay."""
        module = self._module
        now = dict(vars(module))
        bias, (weight,) = module._parameters["bias"], now["_original"]
        vars(module).clear()
        vars(module).update({**self._before, **{name: now[name] for name in now if "hooks" in name}})
        module.__class__ = self._class
        module.training = now["training"]
        module._parameters = {"weight": weight, "bias": bias}


class Swapped(QuantLinear):
    """A quantized layer that keeps the weight it was made from."""

    _original: list[nn.Parameter]  # in a list, which keeps it out of the module's parameters

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self._original[0]
        destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self._original[0].data = fn(self._original[0].data)
        return super()._apply(fn, recurse)


def packed_of(module: nn.Module | None) -> PackedWeight | None:
    """The packed weight of a quantized layer, hubkit's or bitsandbytes'; None for any other module.

    Raises:
        HubkitError: ``HK-QUANT-STATE`` for a layer of bitsandbytes that is not quantized yet, or whose weight was
            rearranged for its own CPU kernel, which loses bits.
    """
    if isinstance(module, QuantLinear):
        return module.packed
    weight: Any = getattr(module, "weight", None)
    if not hasattr(weight, "quant_state") or not hasattr(weight, "compress_statistics"):
        return None
    state = weight.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise HubkitError(
            "HK-QUANT-STATE", "bitsandbytes has rearranged the weight" if state else "the weight is not quantized yet",
            want="a layer of bitsandbytes as it was loaded", where=type(module).__name__,
            fix="load the model again and attach before it first answers, or load it with hubkit.load_base",
        )  # fmt: skip
    tensors = {"": weight.data, **state.as_dict(packed=True)}
    return unpacked(tensors, type(module).__name__)


def packed_facts(module: nn.Module) -> tuple[tuple[int, int], torch.dtype, bool] | None:
    """(out, in), dtype of the decoded weight, whether the layer it stands for stored (in, out); None for other modules.

    Never refused: layers of bitsandbytes that cannot be decoded can still be acted at.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if isinstance(module, QuantLinear):
        dtype, transposed = module.packed.dtype if module.packed else torch.get_default_dtype(), module.transposed
    elif isinstance(module, nn.Linear) and state is not None:
        dtype, transposed = state.dtype, getattr(module, "source_cls", nn.Linear).__name__ == "Conv1D"
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
