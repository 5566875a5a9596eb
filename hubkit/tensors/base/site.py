"""One place in a base where something can be added, live or known by its files."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hubkit.artifact.identity.header import TensorInfo
from hubkit.compat.torch import version_of
from hubkit.errors import HubkitError
from hubkit.tensors.base.delta import Delta, accumulation_dtype, aligned
from hubkit.tensors.base.formats import is_coded, refuse_codes
from hubkit.tensors.experts.expert import expert_names
from hubkit.tensors.files.coded import Coded
from hubkit.tensors.files.dtypes import torch_dtype
from hubkit.tensors.files.shards import ReadTensor
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.divided import collected
from hubkit.tensors.fourbit.linear import packed_whole, swapped


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
        coded: it is stored as codes (`hubkit.tensors.base.formats`); `dtype` is that in which the layer computes. There
            is no `weight`, unless of files:
        codes: how they are decoded; `weight` is in float32 then. None where hubkit does not decode them.
        number: of the expert, where `tensor` holds a matrix for each (experts, ...) and this is one of them.
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
    codes: Coded | None = field(default=None, compare=False, repr=False)
    number: int | None = None

    @property
    def group(self) -> str:
        """What names all matrices of its tensor: its own name without the number. Empty where the tensor is its own."""
        stem, _, last = self.name.rpartition(".")
        return "" if self.number is None else f"{stem.rpartition('.')[0]}.{last}"

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
        return aligned(weight.to(accumulation_dtype(stored.dtype))) if self.wide else weight.to(stored.dtype)

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
        return aligned(bias.to(accumulation_dtype(stored.dtype))) if self.wide else bias.to(stored.dtype)

    def version(self) -> object:
        """Equal for as long as the base's own weight is the same; cheaper than `weight`, which may decode it."""
        own = None if self.module is None else swapped(self.module)
        weight = getattr(self.module, "weight", None) if own is None else own.packed.codes
        return version_of(weight) if isinstance(weight, Tensor) else None

    def _stored(self, tensor: str, attribute: str) -> Tensor:
        if self.coded and self.codes is None and attribute == "weight":
            refuse_codes([self.name], self.tensor)
        if self.module is not None:
            packed = packed_whole(self.module) if attribute == "weight" else None
            if packed is not None:
                return dequantize(packed).t() if self.transposed else dequantize(packed)
            value = getattr(self.module, attribute)
            assert isinstance(value, Tensor)
            return collected(value.detach())
        if self.read is None:
            raise HubkitError(
                "HK-BASE-NEEDED",
                f"the weight of {self.name} is needed and only its header is at hand",
                where=self.tensor,
                fix="name the base's folder with --base",
            )
        if self.codes is not None and attribute == "weight":
            return self.codes.decoded(self.read)
        return self.read(tensor) if self.number is None else self.read(tensor, self.number)

    def widened(self) -> Site:
        """The same site, handing out weight and bias in the dtype of accumulation."""
        return replace(self, wide=True)

    def hollow(self) -> Site:
        """The same site with a weight and a bias on the meta device: for what follows from shapes."""

        def read(tensor: str, number: int | None = None, /) -> Tensor:
            out, features = self.shape
            weight = (out,) if self.kind == "norm" else (features, out) if self.transposed else (out, features)
            return torch.empty(weight if tensor == self.tensor else (out,), dtype=self.dtype, device="meta")

        return replace(self, module=None, read=read)

    def after(self, delta: Delta) -> Site:
        """The same site with `delta` added: what the next member of a stack sees."""
        return replace(self, change=delta if self.change is None else self.change.plus(delta))


def expert_sites(
    tensor: str, info: TensorInfo, turned: bool, computed: torch.dtype, read: ReadTensor | None
) -> Iterator[Site]:
    """The sites whose matrices lie one after the other in one tensor of the files, (experts, ...).

    Args:
        turned: each is (in, out), not (out, in).
        computed: the dtype in which the base computes, where it stores codes.
    """
    count, rows, columns = info.shape
    shape, dtype = (columns, rows) if turned else (rows, columns), torch_dtype(info.dtype)
    coded = is_coded(dtype)
    for number, name in enumerate(expert_names(tensor, count)):
        own = computed if coded else dtype
        yield Site(name, "linear", shape, own, turned, tensor, None, read=read, coded=coded, number=number)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 10 after layer 9."""
    return list(map(_step, name.split(".")))


@functools.lru_cache(4096)
def _step(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (-1, part)
