"""Adopting what PEFT saves of a changed vocabulary: rows of single tokens, or whole tables of a resized model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.added_tokens import added_since, read_tokenizer, vocabulary_of
from hubkit.artifact.identity.base_tokenizer import TOKENIZER
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.artifact.forms import PeftForm
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.site import Site

Parts = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Folder:
    """What is adopted: the adapter's folder, its base's, and the tensors of its file."""

    path: Path
    base: Path
    stored: Mapping[str, Tensor]


def rows_alone(
    folder: Folder, form: PeftForm, parts: Parts, saved: set[str], values: Mapping[str, Any], base: Base
) -> tuple[dict[str, Tensor], dict[str, Mapping[str, str]], dict[str, Any]]:
    """Tensors, parts and configuration with every table of a resized model reduced to the rows that are new.

    Args:
        parts: site -> role -> key, as `split_keys` found them.
        saved: sites that the configuration says are trained as a whole.

    Raises:
        HubkitError: ``HK-VOCABULARY`` where the rows of old tokens changed, or names of new ones are not to be had;
            ``HK-KEYS`` for a changed copy of a base weight.
    """
    from hubkit.artifact.forms import to_key
    from hubkit.tensors.base.token_sites import ROWS, SUFFIX, table_size

    stored, kept, made = dict(folder.stored), dict(parts), dict(values)
    tables = {n.removesuffix(SUFFIX): s for n, s in base.rows.items()}
    tied = {s.name: s for s in base.sites.values() if s.tied and any(s.tensor == t.tensor for t in tables.values())}
    sizes: set[int] = set()
    for name, site in {**tables, **tied}.items():
        key = parts.get(name, {}).get("weight", "")
        size = table_size(site)[0]
        if not key or (stored[key].shape[0] <= size and name in saved):
            continue
        rows = stored.pop(key)
        del kept[name]
        _require_old_rows(rows, site, key, resized=rows.shape[0] > size)
        sizes.add(int(rows.shape[0]))
        if rows.shape[0] > size and name in tables:
            stored[to_key(form, name + SUFFIX, ROWS, ROWS)] = rows[size:].clone()
            kept[name + SUFFIX] = {ROWS: to_key(form, name + SUFFIX, ROWS, ROWS)}
    old = table_size(next(iter(tables.values())))[0] if tables else 0
    if any(size > old for size in sizes):
        if len(sizes) > 1 or not all(name + SUFFIX in kept for name in tables):
            raise _refusal("embeddings and output head have different numbers of rows", sorted(map(str, sizes)), folder)
        new = sizes.pop() - old
        names = added_since(folder.base, folder.path, old, new)
        made |= {"token_ids": list(range(old, old + new)), "add_tokens": names}
    elif values.get("token_ids"):
        made |= _named(folder, form, kept, stored, list(values["token_ids"]), base, tables)
    return stored, kept, made


def _require_old_rows(rows: Tensor, site: Site, key: str, *, resized: bool) -> None:
    """The base's own rows must be in a table that is not said to be trained."""
    import torch

    from hubkit.tensors.base.token_sites import table_size, token_table

    size, own = table_size(site)[0], token_table(site)
    if (
        rows.dim() == 2
        and rows.shape[1:] == own.shape[1:]
        and torch.equal(rows[:size], own.to(rows.dtype)[: len(rows)])
    ):
        return
    what = "the adapter's table has new rows, and those of the base's own tokens changed, too"
    if not resized:
        raise HubkitError(
            "HK-KEYS",
            "the adapter carries a changed copy of a base weight",
            where=key,
            want="the base's own values",
            fix="use the base that the adapter was trained on",
        )
    raise HubkitError(
        "HK-VOCABULARY",
        what,
        where=key,
        want=f"the base's {size} rows, and new ones below them",
        fix="merge it with the tool that trained it: this is a new model more than an adapter",
    )


def _named(
    folder: Folder,
    form: PeftForm,
    parts: dict[str, Mapping[str, str]],
    stored: dict[str, Tensor],
    ids: list[int],
    base: Base,
    tables: Mapping[str, Site],
) -> dict[str, Any]:
    """Ids and names of the tokens whose rows are trained; those that the base lacks last, as the configuration has it.

    Where the rows of an untied head are not trained, they are the base's own.
    """
    from hubkit.artifact.forms import to_key
    from hubkit.tensors.base.token_sites import ROWS, SUFFIX, table_size, token_table

    size = table_size(next(iter(tables.values())))[0] if tables else 0
    names: dict[int, str] = {}
    if (folder.path / TOKENIZER).is_file() and (folder.base / TOKENIZER).is_file():
        mine, theirs = (vocabulary_of(read_tokenizer(place)) for place in (folder.base, folder.path))
        names = {number: token for token, number in theirs.items() if token not in mine and number in ids}
    if unnamed := [str(i) for i in ids if i >= size and i not in names]:
        raise _refusal("the adapter has rows for tokens beyond the base's, and nothing says which", unnamed, folder)
    order = sorted(range(len(ids)), key=lambda at: (ids[at] in names, ids[at]))
    for name, site in tables.items():
        key = to_key(form, name + SUFFIX, ROWS, ROWS)
        if key in stored and stored[key].dim() == 2 and stored[key].shape[0] == len(ids):
            stored[key] = stored[key][order]
        elif key not in stored and max(ids) < size:
            stored[key] = token_table(site)[[ids[at] for at in order]].contiguous()
            parts[name + SUFFIX] = {ROWS: key}
    return {"token_ids": [ids[at] for at in order], "add_tokens": [names[ids[at]] for at in order if ids[at] in names]}


def _refusal(what: str, have: list[str], folder: Folder) -> HubkitError:
    return HubkitError(
        "HK-VOCABULARY",
        what,
        where=str(folder.path),
        have=have,
        fix="put the tokenizer.json it was trained with into its folder, or merge it with the tool that trained it",
    )
