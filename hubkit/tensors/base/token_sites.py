"""The embedding table and the output head: which is tied to the other, and the sites beside them where rows of single
tokens act.

Of an encoder-decoder they are no sites. Its encoder, decoder and head read one table through modules of their own;
which of these is called, and which holds the table, is not the same in two releases of transformers, and a part at one
of them would not reach the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from hubkit.artifact.identity.config_identity import TEXT_TYPE, ties
from hubkit.tensors.base.arch import Arch
from hubkit.tensors.base.decoder import RELATIVE, embedding_table
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.shards import ReadTensor

T = TypeVar("T")
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")

ROWS = "rows"
"""The kind of the virtual sites where rows of tokens act."""
SUFFIX = ".token_adapter"
SHARED = "encoder, decoder and head share one table, and a change at one would not reach the others: other targets"
_STACK = re.compile(r"(.*?)(encoder|decoder)\.(?:block|layers)\.\d+\..+")


def token_table(site: Site) -> Tensor:
    """The weight of a table or head with one row per token, (vocabulary, hidden)."""
    return site.weight().t() if site.transposed else site.weight()


def table_size(site: Site) -> tuple[int, int]:
    """(vocabulary, hidden) of a table or head."""
    return (site.shape[1], site.shape[0]) if site.transposed else site.shape


def row_sites(sites: Mapping[str, Site], table: Site | None, is_head: Callable[[str], bool]) -> dict[str, Site]:
    """The virtual sites beside the embedding table and beside an output head that is not tied to it."""
    if table is None:
        return {}
    size = table_size(table)
    heads = [s for s in sites.values() if s.shape == size and not s.tied and is_head(s.name)]
    return {s.name + SUFFIX: replace(s, name=s.name + SUFFIX, kind=ROWS) for s in [table, *heads[:1]]}


def with_tied_head(
    sites: list[Site], arch: Arch, config: Mapping[str, object], read: ReadTensor | None, names: Iterable[str]
) -> list[Site]:
    """`sites`, the output head among them where it is the embedding table: files leave it out or hold it twice."""
    table = embedding_table(sites, arch)
    if table is None or not ties(config):
        return sites
    shape = (table.shape[1], table.shape[0])
    own = arch.head_bias or f"{arch.heads[0]}.bias"
    bias = own if own in names else None
    heads = [site for site in sites if arch.is_head(site.name)]
    if heads:
        fields: dict[str, Any] = {"tensor": table.tensor, "tied": True}
        fields |= {"bias_tensor": bias} if bias else {}
        tied = [replace(site, **fields) for site in heads if site.shape == shape]
        return [site for site in sites if site.name not in {head.name for head in tied}] + tied
    classes = config.get("architectures")
    ends = (*LANGUAGE_MODELS, "ForConditionalGeneration") if _of_parts(config) else LANGUAGE_MODELS
    if not isinstance(classes, list) or not any(str(name).endswith(ends) for name in classes):
        return sites
    name = tied_name(arch.heads[0], table.tensor, config)
    return [*sites, Site(name, "linear", shape, table.dtype, False, table.tensor, bias, tied=True, read=read)]


def encodes(config: Mapping[str, Any], names: Iterable[str]) -> bool:
    """Whether a base is an encoder-decoder: its configuration says so, or there are layers of both.

    Args:
        config: a parsed ``config.json``, or the values of one that an adapter records, which do not say.
        names: of its sites.
    """
    said = config.get("is_encoder_decoder")
    if said is not None:
        return bool(said)
    stacks = {match.groups() for name in names if "coder." in name and (match := _STACK.fullmatch(name))}
    return any((before, "decoder") in stacks for before, kind in stacks if kind == "encoder")


def shared_tables(sites: Iterable[Site]) -> dict[str, str]:
    """The tables of tokens and positions of an encoder-decoder, and a head that is one -> why they are no sites.

    Tables of relative positions are no one else's.
    """
    tables = (site for site in sites if site.tied or site.kind == "embedding")
    return {s.name: SHARED for s in tables if not s.name.endswith(RELATIVE)}


def _of_parts(config: Mapping[str, object]) -> bool:
    """Whether a language model is one of several parts, by a ``config.json`` or what an adapter records of it."""
    return "text_config" in config or TEXT_TYPE in config


def tied_name(own: str, table: str, config: Mapping[str, object]) -> str:
    """What files call an output head that they do not hold, because it is tied to their tensor `table`.

    In a model of several parts it lies where an untied one would: ``language_model.lm_head`` beside
    ``language_model.model.embed_tokens``.

    Args:
        own: its name without regard to parts, or in a live model.
    """
    if not _of_parts(config):
        return own
    return f"{table.rpartition('.model.')[0]}.{own.rpartition('.')[2]}".removeprefix(".")


def heads_last(model: nn.Module, named: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """`named` tensors of `model`, those of its output head behind all others: a tied one is stored as its table.

    XLM-RoBERTa has its head in front of its embeddings.
    """
    head: object = getattr(model, "get_output_embeddings", lambda: None)()
    paths = {path for path, module in model.named_modules() if module is head}
    return sorted(named, key=lambda item: item[0].rpartition(".")[0] in paths)
