"""The causal decoder, or the encoder, of a base as its configuration describes it.

The virtual sites lie here: ``kv``, in front of every attention's keys and values, and ``tokens``, in front of the
input embeddings. They hold no weight of the base, so nothing that walks over its weights meets them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubkit.artifact.identity.base_files import local, read_config
from hubkit.artifact.identity.config_identity import config_values
from hubkit.errors import HubkitError
from hubkit.tensors.base.arch import Arch, arch_of, decoders, encoders
from hubkit.tensors.base.site import Site

_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


@dataclass(frozen=True)
class Decoder:
    """Sizes of a causal decoder or of an encoder.

    Args:
        layers: number of attention layers.
        kv_heads: heads of keys and values; fewer than those of queries where they are grouped.
        head_dim: size of one head.
        hidden: size of an embedding.
        context: the longest text it was made for, in tokens; None where the configuration at hand does not say.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int | None


def decoder_of(arch: Arch, config: Mapping[str, Any], where: str) -> Decoder:
    """The decoder that `config` describes: a parsed ``config.json``, or the values of one that an adapter records.

    Raises:
        HubkitError: ``HK-ARCH`` for an architecture whose attention is not listed, or a config that lacks a size.
    """
    values = config if "layers" in config else config_values(config)
    hidden, heads, layers = (values.get(name) for name in ("hidden_size", "heads", "layers"))
    crossed = config.get("add_cross_attention") is True
    odd = crossed or (not arch.attention and (arch.encoder is None or config.get("is_decoder") is True))
    if odd or not (type(hidden) is type(heads) is type(layers) is int and heads):
        raise HubkitError(
            "HK-ARCH", "this architecture has no known place for virtual tokens", where=where,
            want=f"a causal decoder of type {', '.join(decoders())}; an encoder of type {', '.join(encoders())}",
            have=f"{config.get('model_type')}{' with cross attention' if crossed else ''}",
            fix="a method that edits weights or activations works on any architecture",
        )  # fmt: skip
    kv_heads, head_dim = values.get("kv_heads") or heads, values.get("head_dim") or hidden // heads
    return Decoder(layers, kv_heads, head_dim, hidden, context_length(config, arch))


def context_of_folder(path: Path) -> int | None:
    """`context_length` of the base in folder `path`.

    Raises:
        HubkitError: ``HK-BASE-MISSING``, ``HK-BASE-FILES``, ``HK-JSON``; ``HK-ARCH-FILE``.
    """
    config = read_config(local(path))
    return context_length(config, arch_of(str(config.get("model_type", ""))))


def context_length(config: Mapping[str, Any], arch: Arch) -> int | None:
    """The longest text, in tokens, that a base was made for; None when its configuration does not say.

    Args:
        config: a parsed ``config.json``.
        arch: the facts of its architecture.
    """
    context = next((config[key] for key in _CONTEXT if type(config.get(key)) is int), None)
    if context is not None and arch.encoder is not None and arch.encoder.counted_positions:
        pad = config.get("pad_token_id")
        context -= (pad if type(pad) is int else 1) + 1  # rows of the table of positions that no token has
    return context


def virtual_sites(sites: Mapping[str, Site], arch: Arch, config: Mapping[str, Any], where: str) -> dict[str, Site]:
    """``kv`` and ``tokens`` of a base that has a place for them; their dtype and device are the embedding table's."""
    table = embedding_table(sites.values(), arch)
    if table is None:
        return {}
    try:
        decoder = decoder_of(arch, config, where)
    except HubkitError:
        return {}
    shape = (2 * decoder.layers * decoder.kv_heads, decoder.head_dim)
    tokens = replace(table, name="tokens", kind="tokens")
    return {"kv": replace(table, name="kv", kind="kv", shape=shape), "tokens": tokens}


def embedding_table(sites: Iterable[Site], arch: Arch) -> Site | None:
    """The table of the input tokens' embeddings."""
    tables = [site for site in sites if site.kind == "embedding"]
    return min(tables, key=lambda s: _rank(arch, s.name), default=None)


def _rank(arch: Arch, name: str) -> int:
    last = name.rpartition(".")[2]
    return arch.embeddings.index(last) if last in arch.embeddings else len(arch.embeddings)
