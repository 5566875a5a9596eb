"""Which tensors of a base's files count for its identity, and the digests over all of them.

Left out, because one copy of a model carries them and the next does not:

==============================================  ======================================================================
buffers a model computes itself                 ``*.inv_freq``, ``*.cos_cached``, ``*.sin_cached`` (rotary embeddings);
                                                ``*.attn.bias``, ``*.attention.bias`` of shape (1, 1, n, n) (causal
                                                masks of GPT-2, GPT-Neo, GPT-NeoX, GPT-J, CodeGen); ``*.masked_bias``
                                                of one value; integer ``*.position_ids``, ``*.token_type_ids``
                                                of shape (1, n) (BERT, RoBERTa, CLIP)
a tied alias equal to its partner,              ``lm_head.weight`` and other heads ~ the input embeddings;
where the config ties                           ``encoder.``/``decoder.embed_tokens.weight`` ~ ``shared.weight``;
                                                BERT's ``predictions.decoder.bias`` ~ ``predictions.bias``
==============================================  ======================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from hubkit.documents.schema import sha256


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """One tensor of a base, as ``tensors.json`` lists it.

    Args:
        name: as in the file.
        dtype: the dtype its values were hashed in (see `values.values_digest`), so that lossless copies agree; the
            file's own when nothing was hashed.
        shape: sizes of the dimensions.
        sha256: ``sha256:<hex>`` of the values; empty when unknown (a remote base).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


class _Tensor(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=_Tensor)

_ROTARY: Final = re.compile(r"(^|\.)(\w*inv_freq|cos_cached|sin_cached)$")
_MASK: Final = re.compile(r"(^|\.)(attn|attention)\.(bias|causal_mask)$")
_MASKED: Final = re.compile(r"(^|\.)masked_bias$")
_IDS: Final = re.compile(r"(^|\.)(position_ids|token_type_ids)$")
_BUFFER_ENDS: Final = ("_freq", "_cached", "bias", "causal_mask", "_ids")  # a quick look before the patterns
_INTEGERS: Final = frozenset({"I64", "I32"})

_INPUT: Final = r"(^|\.)(embed_tokens|wte|shared|word_embeddings|embed_in|tok_embeddings)\.weight$"
_TIED: Final = tuple(
    (re.compile(alias), re.compile(partner))
    for alias, partner in (
        (r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$", r"(^|\.)shared\.weight$"),
        (r"(^|\.)(lm_head|embed_out|proj_out|vocab_projector|predictions\.decoder|lm_head\.decoder)\.weight$", _INPUT),
        (r"(^|\.)predictions\.decoder\.bias$", r"(^|\.)predictions\.bias$"),
        (r"(^|\.)lm_head\.decoder\.bias$", r"(^|\.)lm_head\.bias$"),
    )
)


def is_buffer(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one that models compute themselves (first row of this module's table)."""
    if not name.endswith(_BUFFER_ENDS):
        return False
    if _ROTARY.search(name):
        return True
    if _MASK.search(name):
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    if _MASKED.search(name):
        return shape in ((), (1,))
    return bool(_IDS.search(name)) and dtype in _INTEGERS and len(shape) == 2 and shape[0] == 1


def is_alias(name: str, partner: str) -> bool:
    """Whether, by their names, `name` is the output end of a tied pair and `partner` its input end."""
    return name != partner and any(alias.search(name) and other.search(partner) for alias, other in _TIED)


def counted(tensors: Iterable[TensorDigest], ties: bool) -> tuple[TensorDigest, ...]:
    """The tensors that make a base's identity, sorted by name: without buffers and without tied aliases.

    Args:
        tensors: all tensors of the files or of a live model, with digests.
        ties: whether the config ties input and output embeddings (`hubkit.artifact.identity.config_identity.ties`).
    """
    return _counted(tensors, ties, lambda t: (t.dtype, t.shape, t.sha256))


def _counted(tensors: Iterable[T], ties: bool, same: Callable[[T], object]) -> tuple[T, ...]:
    kept = sorted((t for t in tensors if not is_buffer(t.name, t.dtype, t.shape)), key=lambda t: t.name)
    if not ties:
        return tuple(kept)
    aliases = [t for t in kept if any(alias.search(t.name) for alias, _ in _TIED)]
    twins = {t.name for t in aliases if any(same(t) == same(p) and is_alias(t.name, p.name) for p in kept)}
    return tuple(t for t in kept if t.name not in twins)


def compose_weights(tensors: Iterable[TensorDigest]) -> str:
    """The digest over the values of a whole base: sha256 of the sorted lines ``name dtype shape digest``.

    The dtype is the one the values were hashed in: the same 16 bits are other numbers in bf16 than in fp16.

    Args:
        tensors: as `counted` gives them; the order does not matter.
    """
    lines = sorted(f"{t.name} {t.dtype} {_shape(t.shape)} {t.sha256}" for t in tensors)
    return sha256("\n".join(lines).encode())


def layout_digest(tensors: Iterable[T], ties: bool) -> str:
    """The digest over a base's tensors without their values: sha256 of the sorted lines ``name dtype shape``.

    Args:
        tensors: all tensors with the dtypes of the file; buffers, and aliases of the same dtype and shape as their
            partner, are left out here.
        ties: as for `counted`.
    """
    kept = _counted(tensors, ties, lambda t: (t.dtype, t.shape))
    return sha256("\n".join(f"{t.name} {t.dtype} {_shape(t.shape)}" for t in kept).encode())


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
