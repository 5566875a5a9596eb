"""Where the weight of a site lies in a GGUF.

Names come from the package's own table (``TensorNameMap``). What that does not say is here: experts are stacked, and
three matrices may be one on either side ::

    model.layers.3.mlp.experts.7.gate_proj (I, H)    blk.3.ffn_gate_exps.weight[7]             or
                                                     blk.3.ffn_gate_up_exps.weight[7], rows 0..I
    model.layers.3.self_attn.qkv_proj                blk.3.attn_qkv.weight                     or, row by row, in
                                                     blk.3.attn_q, attn_k and attn_v
    model.layers.3.self_attn.k_proj                  blk.3.attn_k.weight                       or in blk.3.attn_qkv
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hubkit.engines.gguf.base import HEAD, TABLE, GgufBase
from hubkit.engines.gguf.header import package

FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
"""Last name of a GGUF tensor -> those that it may hold instead, in the order of its rows."""
SPLIT: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "gate_up_proj": ("ffn_gate", "ffn_up"),
}
"""Last name of a module that is several in one -> the GGUF tensors that may hold it apart, in the order of its rows."""
_EXPERT = re.compile(r"(.*\.experts)\.([0-9]+)\.([^.]+)")
_BLOCK = re.compile(r"(?:.*\.)?layers\.([0-9]+)\..+")


@dataclass(frozen=True)
class Place:
    """Rows of a matrix in a GGUF, and the rows of a site's weight that they are.

    Args:
        tensor: the GGUF's tensor.
        expert: which matrix, where the tensor is a stack of them.
        rows: first row there, and one past the last.
        source: first row of the site's weight, and one past the last.
        heads: number of heads that these rows are of, where they may be permuted within each; 0: they are not.
    """

    tensor: str
    expert: int | None
    rows: tuple[int, int]
    source: tuple[int, int]
    heads: int = 0


class Names:
    """Finds places in one GGUF.

    Args:
        base: the GGUF.
        height: name of a module -> rows of its weight, None where there is no such module.
    """

    def __init__(self, base: GgufBase, height: Callable[[str], int | None]) -> None:
        gguf = package()
        arch = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == base.architecture)
        self.base, self.height = base, height
        self.map = gguf.get_tensor_name_map(arch, base.blocks)

    def places(self, site: str, end: str = "weight") -> list[Place]:
        """Where the weight (or ``bias``) of a site lies; none where the GGUF has no place for it."""
        rows = self.height(site)
        stem, expert = spelled(site)
        if rows is None:
            return []
        direct = self.map.get_name(stem)
        apart = self._apart(stem, rows, end)
        if apart:
            return apart
        tensor = f"{direct}.{end}"
        if tensor in self.base.tensors:
            known = self.base.shape(tensor)[1]
            short = tensor in (TABLE, HEAD) and known < rows  # converters leave out rows that no token has
            return [self._place(tensor, expert, 0, known if short else max(known, rows), 0)]
        return self._within(site, direct, rows, end, expert) if direct is not None else []

    def _apart(self, stem: str, rows: int, end: str) -> list[Place]:
        """A module that is several in one, where the GGUF holds them apart."""
        block, last = _BLOCK.fullmatch(stem), stem.rpartition(".")[2]
        if block is None or last not in SPLIT:
            return []
        tensors = [f"blk.{block[1]}.{name}.{end}" for name in SPLIT[last]]
        if not all(name in self.base.tensors for name in tensors):
            return []
        found, at = [], 0
        for name in tensors:
            size = self.base.shape(name)[1]
            found.append(self._place(name, None, 0, size, at))
            at += size
        return found if at == rows else []

    def _within(self, site: str, direct: str, rows: int, end: str, expert: int | None) -> list[Place]:
        """A module whose rows are part of a larger tensor of the GGUF."""
        block, _, last = direct.rpartition(".")
        for whole, members in FUSED.items():
            if last not in members or f"{block}.{whole}.{end}" not in self.base.tensors:
                continue
            before = 0
            for member in members[: members.index(last)]:
                height = self.height(self._sibling(site, member))
                if height is None:
                    return []
                before += height
            return [self._place(f"{block}.{whole}.{end}", expert, before, before + rows, 0, last)]
        return []

    def _sibling(self, site: str, member: str) -> str:
        """The module beside `site` that a GGUF calls `member`."""
        parent = site.rpartition(".")[0]
        for last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3"):
            name = f"{parent}.{last}"
            if (self.map.get_name(spelled(name)[0]) or "").rpartition(".")[2] == member and self.height(name):
                return name
        return ""

    def _place(self, tensor: str, expert: int | None, first: int, last: int, source: int, member: str = "") -> Place:
        name = member or tensor.split(".")[-2]
        heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}.get(name)
        count = self.base.number(heads) if heads else 0
        return Place(tensor, expert, (first, last), (source, source + last - first), count)


def spelled(site: str) -> tuple[str, int | None]:
    """A site's name as the package's table has it, and which expert it is of.

    Left out are the number of an expert, and what a model of several parts puts before its language model's names.
    """
    name = site.replace("language_model.model.", "model.").replace("language_model.", "")
    found = _EXPERT.fullmatch(name)
    return (name, None) if found is None else (f"{found[1]}.{found[3]}", int(found[2]))
