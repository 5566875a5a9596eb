"""What hubkit knows of architectures, as data (``arch.json``): heads, embeddings, inputs that sites share, file names.

Everything else is read from the model itself, so an architecture that is not listed works too.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Arch:
    """Facts about one architecture.

    Args:
        heads: last names of output heads, that of the language model first: left out of ``all-linear``.
        head_bias: name in the files of the language model head's bias, where it is not ``<head>.bias``.
        embeddings: last names of embedding tables (needed where only file headers are at hand).
        norms: expression for the last names of norms (as above).
        shared_inputs: groups of sibling modules that are called with the same input.
        prefix: prefix that the modules of the language model have and that old files may lack.
        transposed: last names of modules that store their weight (in, out), as GPT-2's Conv1D does.
        attention: class of the self-attention modules of a causal decoder; empty: no known place for virtual tokens.
        cache: names of the argument that carries a decoder's or an attention's cache; the first that it has.
        learned_positions: positions are rows of a table, so that there is none beyond its end.
    """

    heads: tuple[str, ...]
    head_bias: str
    embeddings: tuple[str, ...]
    norms: str
    shared_inputs: tuple[tuple[str, ...], ...]
    prefix: str
    transposed: tuple[str, ...]
    attention: str
    cache: tuple[str, ...]
    learned_positions: bool

    def is_head(self, name: str) -> bool:
        return any(name == head or name.endswith("." + head) for head in self.heads)

    def is_norm(self, last: str) -> bool:
        return re.fullmatch(self.norms, last) is not None

    def groups(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Site name -> the sites (itself among them, in call order) that share its input."""
        known = set(names)
        found: dict[str, tuple[str, ...]] = {}
        for name in known:
            parent, dot, last = name.rpartition(".")
            for group in self.shared_inputs:
                if last in group:
                    members = tuple(parent + dot + other for other in group if parent + dot + other in known)
                    if len(members) > 1:
                        found[name] = members
        return found


@functools.cache
def _table() -> dict[str, dict[str, object]]:
    table: dict[str, dict[str, object]] = json.loads((files("hubkit.tensors") / "arch.json").read_text("utf-8"))
    return table


@functools.cache
def arch_of(model_type: str) -> Arch:
    """The facts for a ``model_type`` of transformers; the defaults for one that is not listed."""
    fields = _table()["default"] | _table().get(model_type, {})
    groups = fields["shared_inputs"]
    assert isinstance(groups, list)
    return Arch(
        heads=_words(fields["heads"]),
        head_bias=str(fields["head_bias"]),
        embeddings=_words(fields["embeddings"]),
        norms=str(fields["norms"]),
        shared_inputs=tuple(tuple(group) for group in groups),
        prefix=str(fields["prefix"]),
        transposed=_words(fields["transposed"]),
        attention=str(fields["attention"]),
        cache=_words(fields["cache"]),
        learned_positions=bool(fields["learned_positions"]),
    )


def decoders() -> list[str]:
    """The model types whose attention is listed."""
    return sorted(model_type for model_type, fields in _table().items() if fields.get("attention"))


def _words(value: object) -> tuple[str, ...]:
    assert isinstance(value, list)
    return tuple(str(word) for word in value)
