"""A base in GGUF: which architecture it is, which tensors it has, and the rows of a matrix, decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.engines.gguf.header import FIX, TensorInfo, package, read_header
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KNOWN: Mapping[str, tuple[str, ...]] = {
    "llama": ("llama", "mistral", "mixtral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "qwen3moe": ("qwen3_moe",),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3", "gemma3_text"),
    "phi3": ("phi3",),
}
"""``general.architecture`` -> ``model_type`` of transformers. Others are refused: where llama.cpp permutes, splits or
adds to weights stands in its converters, one by one."""
TABLE = "token_embd.weight"
HEAD = "output.weight"
"""The token table, and the output head where it is not tied to that."""
FLOATS: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of ggml whose values are themselves -> the dtype of torch."""


@dataclass(frozen=True)
class GgufBase:
    """A model in GGUF.

    Args:
        path: the file.
        architecture: ``general.architecture``.
        metadata: see `hubkit.engines.gguf.header.Header`.
        tensors: its tensors by name.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def blocks(self) -> int:
        """How many layers it has."""
        return self.number("block_count")

    def number(self, key: str) -> int:
        """A number of its architecture's metadata.

        Raises:
            HubkitError: ``HK-GGUF`` where it has none.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, int) or value < 1:
            have, want = f"{self.architecture}.{key}: {value!r}", "a number"
            what = "the GGUF does not say how its model is built"
            raise HubkitError("HK-GGUF", what, where=str(self.path), want=want, have=have, fix=FIX)
        return value

    def shape(self, tensor: str) -> tuple[int, int, int]:
        """(matrices, rows, columns) of a tensor; a vector is one matrix of one column."""
        shape = self.tensors[tensor].shape
        if len(shape) == 1:
            return 1, shape[0], 1
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def type_of(self, tensor: str) -> str:
        """The name of a tensor's ggml type: ``F16``, ``Q8_0``."""
        return str(package().GGMLQuantizationType(self.tensors[tensor].type).name)

    def dtype_of(self, tensor: str) -> torch.dtype | None:
        """The dtype of a tensor whose values are themselves; None where they are codes."""
        import torch

        name = FLOATS.get(self.type_of(tensor))
        found: torch.dtype | None = getattr(torch, name) if name else None
        return found

    def bits(self, tensor: str) -> float:
        """Bits that a value of a tensor takes."""
        return 8 * self.tensors[tensor].size / math.prod(self.tensors[tensor].shape)

    def span(self, tensor: str, expert: int | None, first: int, last: int) -> tuple[int, int]:
        """Where rows `first` to `last` of a matrix are in the file: first byte, one past the last.

        Args:
            expert: which matrix, of a stack of them.
        """
        info, (matrices, rows, _) = self.tensors[tensor], self.shape(tensor)
        width = info.size // (matrices * rows)
        begin = info.start + (expert or 0) * rows * width
        return begin + first * width, begin + last * width

    def rows(self, tensor: str, expert: int | None, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of a matrix, (last - first, columns) in float32.

        Raises:
            HubkitError: ``HK-GGUF`` for a type that the package gguf does not decode.
        """
        import torch

        start, stop = self.span(tensor, expert, first, last)
        data = bytearray(stop - start)
        with open(self.path, "rb") as file:
            file.seek(start)
            if file.readinto(data) != len(data):
                what = "the GGUF was cut off while it was read"
                raise HubkitError("HK-GGUF", what, where=str(self.path), fix="run again when nothing writes to it")
        dtype = self.dtype_of(tensor)
        values = self._decoded(tensor, data) if dtype is None else torch.frombuffer(data, dtype=dtype).float()
        return values.view(last - first, -1)

    def _decoded(self, tensor: str, data: bytearray) -> Tensor:
        import numpy
        import torch

        kind = package().GGMLQuantizationType(self.tensors[tensor].type)
        try:
            values = package().dequantize(numpy.frombuffer(data, numpy.uint8), kind)
        except NotImplementedError as error:
            what, fix = f"the package gguf does not decode {kind.name}", "a GGUF in f16, or another quantization"
            raise HubkitError("HK-GGUF", what, where=f"{self.path}  {tensor}", fix=fix) from error
        return torch.from_numpy(numpy.ascontiguousarray(values, numpy.float32))


def open_gguf(path: Path, model_type: str) -> GgufBase:
    """The base in the GGUF file `path`.

    Args:
        model_type: of the base beside it, in transformers' files.

    Raises:
        HubkitError: ``HK-GGUF`` for an architecture that is not known here, or another one than the base's, and for
            what is no model; what `read_header` raises.
    """
    architecture = architecture_of(model_type, str(path))
    header = read_header(path)
    kind, found = header.metadata.get("general.type", "model"), header.metadata.get("general.architecture")
    if kind != "model":
        what, want = f"the GGUF is no model but of the type {kind!r}", "a model"
        raise HubkitError("HK-GGUF", what, where=str(path), want=want, have=str(kind), fix=FIX)
    if found != architecture:
        what = "the GGUF holds another architecture than the base"
        want, have = f"general.architecture {architecture!r}, for a {model_type}", repr(found)
        raise HubkitError("HK-GGUF", what, where=str(path), want=want, have=have, fix=FIX)
    return GgufBase(path, architecture, header.metadata, header.tensors)


def architecture_of(model_type: str, where: str) -> str:
    """What llama.cpp calls an architecture of transformers.

    Raises:
        HubkitError: ``HK-GGUF`` for one that is not known here.
    """
    for architecture, types in KNOWN.items():
        if model_type in types:
            return architecture
    want = ", ".join(sorted(kind for kinds in KNOWN.values() for kind in kinds))
    what = f"hubkit does not know how llama.cpp holds the architecture {model_type!r}"
    fix = "hubkit merge, then llama.cpp's own convert_hf_to_gguf.py"
    raise HubkitError("HK-GGUF", what, where=where, want=want, have=model_type, fix=fix)
