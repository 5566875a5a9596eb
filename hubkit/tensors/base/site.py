"""One place in a base where something can be added, live or known by its files."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hubkit.compat.torch import version_of
from hubkit.errors import HubkitError
from hubkit.tensors.base.delta import Delta, accumulation_dtype
from hubkit.tensors.base.formats import refuse_codes
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.files import ReadTensor
from hubkit.tensors.fourbit.linear import packed_of, swapped


@dataclass(frozen=True)
class Site:
    """A place in the base where something can be added.

    Args:
        name: the module's path, as the base's files name it.
        kind: ``linear``, ``embedding`` or ``norm``; ``block`` for a `Block` (blocks.py), without a weight.
        shape: (out, in); an embedding table is (hidden, vocabulary), the gain of a norm over n features (n, 1).
        dtype: dtype of the stored weight.
        transposed: the storage is (in, out): GPT-2's Conv1D, every embedding table.
        tensor: name of the weight in the base's files.
        bias_tensor: name of the bias there, or None.
        tied: the output head of a base that ties it: `tensor` is the embedding's.
        module: the live module, if there is one.
        read: reads a tensor of the base's files, if there are any.
        change: what lower members of a stack have already added.
        wide: hand out weight and bias in the dtype of accumulation (merging) instead of the stored one.
        packed: the weight is quantized in the base's files; `weight` decodes it.
        coded: it is stored as codes that hubkit does not decode (`hubkit.tensors.base.formats`): there is no `weight`;
            `dtype` is that in which the layer computes.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    dtype: torch.dtype
    transposed: bool
    tensor: str
    bias_tensor: str | None
    tied: bool = False
    module: nn.Module | None = field(default=None, compare=False, repr=False)
    read: ReadTensor | None = field(default=None, compare=False, repr=False)
    change: Delta | None = field(default=None, compare=False, repr=False)
    wide: bool = False
    packed: bool = False
    coded: bool = False

    @property
    def device(self) -> torch.device:
        """Where the live weight is; the CPU for files."""
        weight = getattr(self.module, "weight", None)
        return weight.device if isinstance(weight, Tensor) else torch.device("cpu")

    def weight(self) -> Tensor:
        """The weight, (out, in), with the changes of lower members of a stack; the base's own values are detached."""
        stored = self._stored(self.tensor, "weight")
        weight = stored.t() if self.transposed else stored.view(self.shape)
        matrix = None if self.change is None else self.change.matrix()
        if matrix is not None:
            weight = weight.to(matrix.dtype) + matrix
        return weight.to(accumulation_dtype(stored.dtype)) if self.wide else weight.to(stored.dtype)

    @property
    def has_bias(self) -> bool:
        """Whether there is one. A live module is asked: torch.compile compares names that are read, by layer."""
        return self.bias_tensor is not None if self.module is None else getattr(self.module, "bias", None) is not None

    def bias(self) -> Tensor | None:
        """The bias, (out,), or None."""
        if not self.has_bias:
            return None
        stored = self._stored(self.bias_tensor, "bias")  # type: ignore[arg-type]
        bias = stored
        if self.change is not None and self.change.bias is not None:
            bias = bias.to(self.change.bias.dtype) + self.change.bias
        return bias.to(accumulation_dtype(stored.dtype)) if self.wide else bias.to(stored.dtype)

    def version(self) -> object:
        """Equal for as long as the base's own weight is the same; cheaper than `weight`, which may decode it."""
        own = None if self.module is None else swapped(self.module)
        weight = getattr(self.module, "weight", None) if own is None else own.packed.codes
        return version_of(weight) if isinstance(weight, Tensor) else None

    def _stored(self, tensor: str, attribute: str) -> Tensor:
        if self.coded and attribute == "weight":
            refuse_codes([self.name], self.tensor)
        if self.module is not None:
            packed = packed_of(self.module) if attribute == "weight" else None
            if packed is not None:
                return dequantize(packed).t() if self.transposed else dequantize(packed)
            value = getattr(self.module, attribute)
            assert isinstance(value, Tensor)
            return value.detach()
        if self.read is None:
            raise HubkitError(
                "HK-BASE-NEEDED",
                f"the weight of {self.name} is needed and only its header is at hand",
                where=self.tensor,
                fix="name the base's folder with --base",
            )
        return self.read(tensor)

    def widened(self) -> Site:
        """The same site, handing out weight and bias in the dtype of accumulation."""
        return replace(self, wide=True)

    def after(self, delta: Delta) -> Site:
        """The same site with `delta` added: what the next member of a stack sees."""
        return replace(self, change=delta if self.change is None else self.change.plus(delta))
