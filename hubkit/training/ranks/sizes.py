"""How many bytes of a model lie with one process, before anything is divided: by arithmetic alone, also on `meta`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hubkit.tensors.fourbit.divided import hollowed
from hubkit.tensors.fourbit.linear import QuantLinear, quantizable, shell
from hubkit.tensors.fourbit.nf4 import BLOCK, LEVELS, NESTED, PackedWeight
from hubkit.training.ranks.sharding import layers


def share_of(tensor: Tensor, size: int) -> int:
    """Bytes of the largest share of `tensor` among `size` processes: FSDP2 cuts the first dimension, and pads."""
    if tensor.dim() == 0:
        return tensor.element_size()
    rows = tensor.shape[0]
    return -(-rows // size) * (tensor.numel() // max(1, rows)) * tensor.element_size()


def bytes_per_process(model: nn.Module, size: int) -> int:
    """Bytes of parameters that lie with one of `size` processes between two steps, where the base is divided.

    Args:
        model: the base, on any device; quantized layers filled, whether or not they are divided already.
    """
    return sum(share_of(tensor, size) for tensor in _parameters(model))


def gathered_at_most(model: nn.Module) -> int:
    """Bytes that are gathered beside the shares while a step runs: the root's group, and two layers.

    FSDP2 gathers the next layer while one computes.
    """
    groups = [_whole(layer) for layer in layers(model)]
    root = _whole(model) - sum(groups)
    return root + sum(sorted(groups)[-2:])


def _whole(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _parameters(module))


def _parameters(module: nn.Module) -> list[Tensor]:
    """Each tensor that FSDP2 divides, once."""
    found: list[Tensor] = list(module.parameters())
    for layer in module.modules():
        if isinstance(layer, QuantLinear) and not layer.divided and layer.packed is not None:
            found += hollowed(layer.packed)[1].values()
    return found


def packed_outline(rows: int, columns: int, dtype: torch.dtype) -> PackedWeight:
    """A weight, (rows, columns), packed as `hubkit.tensors.fourbit.nf4.quantize` packs it, on `meta`: sizes alone."""
    count = rows * columns
    blocks = -(-count // BLOCK)

    def sized(length: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(length, dtype=kind, device="meta")

    return PackedWeight(
        sized(-(-count // 2), torch.uint8).unsqueeze(1),
        sized(blocks, torch.uint8),
        sized(len(LEVELS)),
        (rows, columns),
        dtype,
        nested_absmax=sized(-(-blocks // NESTED)),
        nested_map=sized(256),
    )


def quantize_outline(model: nn.Module) -> None:
    """Puts empty shells of packed weights in the place of the linear layers of a model on `meta`, but for its head."""
    inside = {id(module) for layer in layers(model) for module in layer.modules()}
    found = [(path, module) for path, module in model.named_modules() if id(module) in inside and quantizable(module)]
    for path, module in found:
        layer = shell(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        layer.fill(packed_outline(layer.out_features, layer.in_features, weight.dtype))
        model.set_submodule(path, layer)
