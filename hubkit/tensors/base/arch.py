"""What hubkit knows of architectures, as data (``arch.json``): heads, embeddings, inputs that sites share, file names,
and where the sub-layers of a layer are.

Everything else is read from the model itself, so an architecture that is not listed works too. A user's own JSON adds
to it (`hubkit.tensors.base.archfile`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hubkit.artifact.identity.config_identity import TEXT_TYPE
from hubkit.tensors.base.archfile import chosen, table


@dataclass(frozen=True)
class Sublayer:
    """Where one sub-layer of a layer is. All names are paths below the layer.

    Of several with one name the first that a layer has counts, so layers of several kinds, and variants of an
    architecture, are described side by side.

    Args:
        role: ``attention`` or ``feedforward``; a layer's only sub-layer is its feedforward.
        name: what its site is called; no module that holds a weight is called so.
        residual: the module that is called with the residual stream as it is before the sub-layer adds to it.
        output: the module whose output is added to the residual stream, norms of its own included; empty: `name`.
        projection: a linear or norm whose rows are the width of the residual stream; a layer that lacks it has no such
            sub-layer. Empty: `residual`.
        argument: which of the arguments of `residual` the residual stream is.
        norm: the norm of the sum, where there is one (post-norm architectures); empty where there is none.
        multiplier: the value of the configuration that the output is multiplied by before it is added; empty: none.
        when: values that the configuration must have.
    """

    role: str
    name: str
    residual: str
    output: str = ""
    projection: str = ""
    argument: int = 0
    norm: str = ""
    multiplier: str = ""
    when: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Encoder:
    """Where virtual tokens go in an encoder.

    Args:
        attention: classes of its self-attention modules; one per implementation in some releases of transformers.
        counted_positions: positions count the tokens that are no padding, from the padding token's id on.
        first_position: classes of the heads that read the first position of the encoder's output.
    """

    attention: tuple[str, ...]
    counted_positions: bool = False
    first_position: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arch:
    """Facts about one architecture.

    Args:
        model_type: what transformers calls it; empty when unknown.
        heads: last names of output heads, that of the language model first: left out of ``all-linear``.
        head_bias: name in the files of the language model head's bias, where it is not ``<head>.bias``.
        embeddings: last names of embedding tables (needed where only file headers are at hand).
        norms: expression for the last names of norms (as above).
        skipped: expression for the paths of modules that are no sites though they hold a matrix or a gain: routers of
            experts, norms that multiply by something else than their gain, and weights that the model itself changes
            (RwkvModel._rescale_layers of transformers 5.23 halves some in eval, but not what is added to them).
        towers: expression for the names of modules that see or hear, and of what joins them to a language model: left
            out of ``all-linear`` where there is one.
        experts: expression for the names, without ``.weight``, of tensors of three dimensions that hold a matrix for
            each expert.
        experts_turned: each of these is (in, out), not (out, in).
        shared_inputs: groups of sibling modules that are called with the same input.
        prefix: prefix that the modules of the language model have and that old files may lack.
        transposed: last names of modules that store their weight (in, out), as GPT-2's Conv1D does.
        attention: class of the self-attention modules of a causal decoder, which take a cache; empty: not known.
        cache: names of the argument that carries a decoder's or an attention's cache; the first that it has.
        encoder: where virtual tokens go in an encoder; None where that is not known.
        learned_positions: positions are rows of a table, so that there is none beyond its end.
        relative_positions: only how far tokens are apart counts: a text may be of any length.
        counted_positions: positions count the tokens that are no padding.
        hiding_masks: what its attention takes for a mask is true where a key is hidden, instead of seen.
        multi_query: all heads of a query share one of keys and values, where the configuration does not say otherwise.
        tokens_since: the first major release of transformers whose attention takes virtual tokens as hubkit gives them.
        since: the first major release of transformers that computes what its files hold.
        without: a virtual site that it cannot have -> why: ``kv``; ``tokens``, which stands for both.
        layers: paths of the lists of layers, in the order in which they run.
        sublayers: the sub-layers of a layer.
        adapterhub: name of a sub-layer -> path below the layer where AdapterHub keeps what acts there; only for
            architectures that AdapterHub builds in.
    """

    model_type: str

    heads: tuple[str, ...]
    head_bias: str
    embeddings: tuple[str, ...]
    norms: str
    skipped: str
    towers: str
    experts: str
    experts_turned: bool
    shared_inputs: tuple[tuple[str, ...], ...]
    prefix: str
    transposed: tuple[str, ...]
    attention: str
    cache: tuple[str, ...]
    learned_positions: bool
    relative_positions: bool
    counted_positions: bool
    hiding_masks: bool
    multi_query: bool
    tokens_since: int
    since: int
    without: Mapping[str, str] = field(hash=False)
    encoder: Encoder | None = None
    layers: tuple[str, ...] = ()
    sublayers: tuple[Sublayer, ...] = ()
    adapterhub: Mapping[str, str] = field(default_factory=dict, hash=False)

    def is_head(self, name: str) -> bool:
        return name.endswith(self._head_ends) or name in self.heads

    def is_norm(self, last: str) -> bool:
        return re.fullmatch(self.norms, last) is not None

    def skips(self, path: str) -> bool:
        return self._skipped.fullmatch(path) is not None

    @functools.cached_property
    def _head_ends(self) -> tuple[str, ...]:
        return tuple(f".{head}" for head in self.heads)

    @functools.cached_property
    def _skipped(self) -> re.Pattern[str]:  # a large mixture has tens of thousands of paths
        return re.compile(self.skipped)

    def leaves_out(self, tensors: Collection[str]) -> bool:
        """Whether the names in some files lack `prefix`, as old files and those of a body alone do."""
        if not self.prefix or any(tensor.startswith(self.prefix) for tensor in tensors):
            return False
        own = tuple(f"{path.removeprefix(self.prefix)}." for path in self.layers if path.startswith(self.prefix))
        return not own or any(tensor.startswith(own) for tensor in tensors)  # a third name is another class's own

    def holds_experts(self, tensor: str) -> bool:
        """Whether a tensor of three dimensions holds a matrix for each expert, by its name in the files."""
        return re.fullmatch(self.experts, tensor.removesuffix(".weight")) is not None

    def tower(self, path: str) -> str:
        """The name of the tower or joint that a module is in; empty for one of a language model."""
        return next((step for step in path.split(".") if re.fullmatch(self.towers, step)), "")

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


def arch_of(model_type: str, text: str = "") -> Arch:
    """The facts for a ``model_type`` of transformers; the defaults for one that is not listed.

    Args:
        text: ``model_type`` of the language model in a model of several parts: where its layers and its attention are,
            is said of that one.

    Raises:
        HubkitError: ``HK-ARCH-FILE``, see `hubkit.tensors.base.archfile.table`.
    """
    return _arch_of(model_type, text, chosen())


def arch_for(config: Mapping[str, Any]) -> Arch:
    """The facts for a base by its configuration: a parsed ``config.json``, or the values that an adapter records.

    Raises:
        HubkitError: as `arch_of`.
    """
    inner = config.get("text_config")
    text = inner.get("model_type") if isinstance(inner, Mapping) else config.get(TEXT_TYPE)
    return arch_of(str(config.get("model_type") or ""), str(text or ""))


@functools.cache
def _arch_of(model_type: str, text: str, file: str) -> Arch:
    fields = _fields(model_type)
    if text:
        own = table().get(model_type, {})
        fields |= {key: value for key, value in _fields(text).items() if key in _TEXT and key not in own}
    groups = fields["shared_inputs"]
    assert isinstance(groups, list)
    return Arch(
        model_type=model_type,
        heads=_words(fields["heads"]),
        head_bias=str(fields["head_bias"]),
        embeddings=_words(fields["embeddings"]),
        norms=str(fields["norms"]),
        skipped=str(fields["skipped"]),
        towers=str(fields["towers"]),
        experts=str(fields["experts"]),
        experts_turned=bool(fields["experts_turned"]),
        shared_inputs=tuple(tuple(group) for group in groups),
        prefix=str(fields["prefix"]),
        transposed=_words(fields["transposed"]),
        attention=str(fields["attention"]),
        cache=_words(fields["cache"]),
        learned_positions=bool(fields["learned_positions"]),
        relative_positions=bool(fields["relative_positions"]),
        counted_positions=bool(fields["counted_positions"]),
        hiding_masks=bool(fields["hiding_masks"]),
        multi_query=bool(fields["multi_query"]),
        tokens_since=int(fields["tokens_since"]),
        since=int(fields["since"]),
        without=fields["without"],
        encoder=_encoder(fields.get("encoder")),
        layers=_words(fields.get("layers", [])),
        sublayers=tuple(Sublayer(**one) for one in fields.get("sublayers", ())),
        adapterhub=fields.get("adapterhub", {}),
    )


_TEXT = {
    *("layers", "sublayers", "without", "attention", "cache", "learned_positions", "counted_positions"),
    *("hiding_masks", "multi_query", "tokens_since", "experts", "experts_turned"),
}
"""What is taken from the language model of a model of several parts; names of weights are those of the whole."""


def decoders() -> list[str]:
    """The model types whose attention is listed."""
    return sorted(model_type for model_type, fields in table().items() if fields.get("attention"))


def encoders() -> list[str]:
    """The model types of encoders that have a known place for virtual tokens."""
    return sorted(model_type for model_type, fields in table().items() if fields.get("encoder"))


def known_layers() -> list[str]:
    """The ``model_type`` of every architecture whose sub-layers are known."""
    return sorted(name for name in table() if _fields(name).get("layers"))


def _fields(model_type: str) -> dict[str, Any]:
    """The facts of one architecture over the defaults; ``like`` names another one whose layers are built alike."""
    own = table().get(model_type, {})
    alike: dict[str, Any] = {}
    like, seen = str(own.get("like", "")), {model_type}
    while like and like not in seen:
        facts = table().get(like, {})
        alike = {**{key: facts[key] for key in ("layers", "sublayers", "without") if key in facts}, **alike}
        seen.add(like)
        like = str(facts.get("like", ""))
    return {**table()["default"], **alike, **own}


def _encoder(fields: Mapping[str, Any] | None) -> Encoder | None:
    if not fields:
        return None
    words: dict[str, Any] = {key: _words(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Encoder(**words)


def _words(value: object) -> tuple[str, ...]:
    assert isinstance(value, list)
    return tuple(str(word) for word in value)
