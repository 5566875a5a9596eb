"""Packed weights in the files of a base: found by their headers, read by the name of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hubkit.artifact.identity.header import TensorInfo
from hubkit.errors import HubkitError
from hubkit.tensors.files.dtypes import torch_dtype
from hubkit.tensors.files.shards import ReadTensor
from hubkit.tensors.fourbit.decode import dequantize
from hubkit.tensors.fourbit.nf4 import STATE, PackedWeight, read_state, unpacked


class PackedHeaders:
    """The packed weights among the tensors of a base.

    Args:
        headers: tensor name -> header, of all files.
        read: reads a tensor; None where only headers are at hand.
        source: the base, for messages.
    """

    def __init__(self, headers: Mapping[str, TensorInfo], read: ReadTensor | None, source: str) -> None:
        self._headers, self._read, self._source = headers, read, source
        self._states = {name[: name.index(f".{STATE}")]: name for name in headers if f".{STATE}" in name}
        self._statistics: dict[str, list[str]] = {}
        for name in headers:
            stem, _, key = name.rpartition(".weight.")
            if key and headers.get(f"{stem}.weight") is not None:
                self._statistics.setdefault(f"{stem}.weight", []).append(key)

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._states or tensor in self._statistics

    def facts(self, tensor: str) -> tuple[tuple[int, int], torch.dtype]:
        """(out, in) and dtype of a packed weight.

        Raises:
            HubkitError: ``HK-QUANT-STATE``; ``HK-BASE-NEEDED`` where there is nothing to read from.
        """
        if self._read is None:
            raise HubkitError(
                "HK-BASE-NEEDED",
                "the base is quantized: what its tensors hold stands in its files only",
                where=f"{self._source}: {tensor}",
                fix="name the base's folder with --base",
            )
        if tensor not in self._states:
            unpacked({key: torch.empty(0) for key in self._statistics[tensor]}, tensor)  # names what is missing
        facts = read_state(self._read(self._states[tensor]), tensor)
        if len(facts.shape) != 2:
            raise HubkitError(
                "HK-QUANT-STATE", "the packed weight is not a matrix", where=tensor, have=str(facts.shape)
            )
        return (facts.shape[0], facts.shape[1]), facts.dtype

    def outline(self, tensor: str) -> PackedWeight:
        """As `packed`, its large tensors on the meta device: they are not read, and the tables of levels are empty.

        Raises:
            HubkitError: as `facts`.
        """
        self.facts(tensor)
        assert self._read is not None
        found = read_state(self._read(self._states[tensor]), tensor)
        sizes = {"codes": tensor, "absmax": f"{tensor}.absmax"}
        sizes |= {} if found.nested_absmax is None else {"nested_absmax": f"{tensor}.nested_absmax"}
        infos = {field: self._headers[name] for field, name in sizes.items() if name in self._headers}
        empty: dict[str, Any] = {
            field: torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="meta")
            for field, info in infos.items()
        }
        return replace(found, **empty)

    def packed(self, tensor: str) -> PackedWeight:
        """The packed weight named `tensor`.

        Raises:
            HubkitError: as `facts`.
        """
        assert self._read is not None
        keys = self._statistics.get(tensor, [])
        return unpacked(
            {"": self._read(tensor), **{key: self._read(f"{tensor}.{key}") for key in keys}},
            f"{self._source}: {tensor}",
        )

    def reader(self, tensor: str, transposed: bool) -> ReadTensor:
        """Reads any tensor; `tensor` itself decoded, (in, out) where the base's architecture stores it so."""

        def read(name: str, number: int | None = None, /) -> Tensor:
            assert self._read is not None
            if name != tensor:
                return self._read(name) if number is None else self._read(name, number)
            weight = dequantize(self.packed(tensor))
            return weight.t() if transposed else weight

        return read


def settings(packed: PackedWeight, dtype: torch.dtype, kept: list[str]) -> dict[str, Any]:
    """The part of ``config.json`` by which transformers and bitsandbytes load weights that are packed like `packed`.

    Args:
        dtype: that it computes in.
        kept: names of the linear layers that are not packed.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": packed.kind,
        "bnb_4bit_use_double_quant": packed.nested_map is not None,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": kept,
    }
