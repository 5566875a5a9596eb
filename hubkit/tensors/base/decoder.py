"""The causal decoder, or the encoder, of a base as its configuration describes it.

The virtual sites lie here: ``kv``, in front of every attention's keys and values, and ``tokens``, in front of the
input embeddings. They hold no weight of the base, so nothing that walks over its weights meets them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hubkit.artifact.identity.base_files import local, read_config
from hubkit.artifact.identity.config_identity import config_values, language
from hubkit.errors import HubkitError
from hubkit.tensors.base.arch import Arch, arch_for, decoders, encoders
from hubkit.tensors.base.archfile import VARIABLE
from hubkit.tensors.base.site import Site

RELATIVE = "relative_attention_bias"
"""Ends of the names of tables whose rows are distances, not tokens: T5's."""
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
        mutual: tokens see those behind them, too, as in PaliGemma's text.
    """

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    context: int | None
    mutual: bool = False


def decoder_of(arch: Arch, config: Mapping[str, Any], where: str) -> Decoder:
    """The decoder that `config` describes: a parsed ``config.json``, or the values of one that an adapter records.

    Raises:
        HubkitError: ``HK-ARCH`` for an architecture whose attention is not known or has no place for virtual tokens,
            or a config that lacks a size.
    """
    values = config if "layers" in config else config_values(config)
    config = language(config)
    sizes = {
        "hidden_size": values.get("hidden_size"),
        "num_hidden_layers": values.get("layers"),
        "num_attention_heads": values.get("heads") or config.get("attention_heads"),  # which XGLM calls them
    }
    known = {name: size for name, size in sizes.items() if type(size) is int and size > 0}
    as_decoder = arch.encoder is not None and config.get("is_decoder") is True
    odd = "with cross attention" if config.get("add_cross_attention") is True else "as a decoder" if as_decoder else ""
    odd = "of an encoder-decoder" if config.get("is_encoder_decoder") is True else odd
    odd = "with ALiBi" if config.get("alibi") is True else odd  # which Falcon folds into its mask
    if odd or len(known) < len(sizes) or "tokens" in arch.without or not (arch.attention or arch.encoder):
        raise no_place("tokens", arch, where, odd, [name for name in sizes if name not in known])
    hidden, layers, heads = known.values()
    several = config.get("multi_query") is False or config.get("new_decoder_architecture") is True
    kv_heads = values.get("kv_heads") or (1 if arch.multi_query and not several else heads)
    head_dim = values.get("head_dim") or hidden // heads
    mutual = config.get("use_bidirectional_attention") in (True, "all")
    return Decoder(layers, kv_heads, head_dim, hidden, context_length(config, arch), mutual)


def no_place(site: str, arch: Arch, where: str, odd: str = "", unsaid: Sequence[str] = ()) -> HubkitError:
    """The refusal of virtual tokens: ``HK-ARCH``.

    Args:
        site: ``kv`` or ``tokens``.
        odd: what the configuration makes of the architecture that has no place for them.
        unsaid: sizes that the configuration does not say.
    """
    kind, why = arch.model_type or "no model_type", arch.without.get(site, "")
    listed = f"a causal decoder of type {', '.join(decoders())}; an encoder of type {', '.join(encoders())}"
    fix = "a method that edits weights or activations works on any architecture"
    if why or odd:
        what = f"virtual tokens have no place here: {why}" if why else "virtual tokens have no place here"
        return HubkitError("HK-ARCH", what, where=where, want=listed, have=f"{kind} {odd}".strip(), fix=fix)
    if arch.attention or arch.encoder:
        what = "the configuration does not say how large keys and values are"
        return HubkitError("HK-ARCH", what, where=where, want=list(unsaid), have=kind, fix=fix)
    own = json.dumps({arch.model_type: {"attention": "<class of its attention modules>"}})
    return HubkitError(
        "HK-ARCH",
        "where the attention of this architecture is, is not known",
        where=where,
        want=listed,
        have=kind,
        fix=f"write {own} into a file and name it in {VARIABLE}; {fix}",
    )


def context_of_folder(path: Path) -> int | None:
    """`context_length` of the base in folder `path`.

    Raises:
        HubkitError: ``HK-BASE-MISSING``, ``HK-BASE-FILES``, ``HK-JSON``; ``HK-ARCH-FILE``.
    """
    config = read_config(local(path))
    return context_length(config, arch_for(config))


def context_length(config: Mapping[str, Any], arch: Arch) -> int | None:
    """The longest text, in tokens, that a base was made for; None when its configuration does not say.

    Args:
        config: a parsed ``config.json``.
        arch: the facts of its architecture.
    """
    if arch.relative_positions:  # T5's n_positions is the length that it was trained with
        return None
    config = language(config)
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
    kv = {} if "kv" in arch.without else {"kv": replace(table, name="kv", kind="kv", shape=shape)}
    return {**kv, "tokens": replace(table, name="tokens", kind="tokens")}


def embedding_table(sites: Iterable[Site], arch: Arch) -> Site | None:
    """The table of the input tokens' embeddings; None of an encoder-decoder, whose table is no site."""
    tables = [site for site in sites if site.kind == "embedding" and not site.name.endswith(RELATIVE)]
    return min(tables, key=lambda s: _rank(arch, s.name), default=None)


def _rank(arch: Arch, name: str) -> int:
    last = name.rpartition(".")[2]
    return arch.embeddings.index(last) if last in arch.embeddings else len(arch.embeddings)
