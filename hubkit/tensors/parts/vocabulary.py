"""Rows of single tokens: tokens that the base does not have, and new rows for some that it has.

    E'[i] = row_i        of the embedding table and, where it is not tied to that, of the output head

An adapter holds these rows alone. Ids beyond the base's table never reach it: a hook looks their rows up here, and
another one lengthens the logits. The rows of several adapters add up like any change, Σ wᵢ (rowᵢ - E[i]), where a row
that the base does not have counts as zero. Files hold the rows themselves, as PEFT's ``trainable_token_indices`` do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import Delta
from hubkit.tensors.base.site import Site
from hubkit.tensors.base.token_sites import SUFFIX, table_size, token_table
from hubkit.tensors.device import indices
from hubkit.tensors.parts.part import Part


class TokenRows(Part):
    """Rows of some tokens, (n, hidden), at the virtual site beside an embedding table or an output head.

    Args:
        site: that site.
        ids: of the tokens.
        names: of those that the adapter adds to the vocabulary: the last of `ids`.
    """

    def __init__(self, site: Site, ids: Sequence[int], names: Sequence[str]) -> None:
        super().__init__()
        self.ids, self.names = tuple(ids), tuple(names)
        self.rows = nn.Parameter(torch.empty(len(self.ids), table_size(site)[1]))

    @property
    def added(self) -> dict[str, int]:
        """Token -> id, of those that the adapter adds."""
        return dict(zip(self.names, self.ids[len(self.ids) - len(self.names) :], strict=True))

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        """The base's own rows; the mean of all rows for a token that it does not have."""
        table = token_table(site)
        self.rows.copy_(table.to(self.rows.dtype).mean(0).expand_as(self.rows))
        known = [at for at, i in enumerate(self.ids) if i < table.shape[0]]
        self.rows[known] = table[[self.ids[at] for at in known]].to(self.rows)


def token_rows(base: Base, ids: Sequence[int], names: Sequence[str]) -> dict[str, Part]:
    """The parts that hold the rows of the tokens `ids`, the last of which are called `names`.

    Raises:
        HubkitError: ``HK-VOCABULARY`` for ids that cannot be, or a base without a table.
    """
    sites = base.rows
    if not ids and not names:
        return {}
    size = table_size(next(iter(sites.values())))[0] if sites else 0
    beyond = sorted(i for i in ids if i >= size)
    wrong = [] if sites else ["the base has no table of embeddings"]
    wrong += [] if len(set(ids)) == len(ids) and min(ids, default=0) >= 0 else ["an id twice, or below 0"]
    wrong += [] if len(set(names)) == len(names) <= len(ids) else [f"{len(set(names))} tokens for {len(ids)} ids"]
    wrong += [] if beyond == list(range(size, size + len(beyond))) else [f"ids {beyond} beyond {size} rows: a gap"]
    wrong += [] if set(beyond) <= set(ids[len(ids) - len(names) :]) else ["new rows without the tokens' names"]
    if wrong:
        raise HubkitError(
            "HK-VOCABULARY",
            "these rows cannot be added to the base's vocabulary",
            where=base.source,
            have=wrong,
            want="the tokens that its tokenizer does not have, and the next free ids",
            fix="--set add_tokens=NAMES lets hubkit train find the ids",
        )
    return {name: TokenRows(site, ids, names) for name, site in sites.items()}


def has_rows(site: Site, parts: Mapping[str, Part]) -> TokenRows | None:
    """The part whose rows act at the table or head `site`; a tied head has its table's."""
    found = parts.get(site.name + SUFFIX)
    if found is None and site.tied:
        found = next((part for part in parts.values() if isinstance(part, TokenRows)), None)
    return found if isinstance(found, TokenRows) else None


def rows_delta(site: Site, parts: Mapping[str, Part], grad: bool) -> Delta | None:
    """What an adapter's rows change in those that `site` has; None when they are nothing of it.

    Args:
        grad: let gradients flow into the rows.
    """
    part = has_rows(site, parts)
    if part is None:
        return None
    own = token_table(replace(site, change=None, wide=True))
    known = [at for at, i in enumerate(part.ids) if i < own.shape[0]]
    if not known:
        return None
    ids = indices(tuple(part.ids[at] for at in known), own.device)
    dense = torch.zeros(own.shape, dtype=own.dtype, device=own.device)
    rows = part.rows if grad else part.rows.detach()
    dense = dense.index_copy(0, ids, rows.index_select(0, indices(tuple(known), rows.device)).to(own) - own[ids])
    return Delta.full(dense.t() if site.transposed else dense)


def added_by(parts: Iterable[Part]) -> dict[str, int]:
    """Token -> id, of the tokens that an adapter of these parts adds."""
    return next((part.added for part in parts if isinstance(part, TokenRows)), {})


def require_one_vocabulary(added: Mapping[str, Mapping[str, int]]) -> None:
    """Refuses adapters that add different tokens: ``HK-VOCABULARY``. Those that add none fit any."""
    kinds = {tuple(sorted(tokens.items())) for tokens in added.values() if tokens}
    if len(kinds) > 1:
        raise HubkitError(
            "HK-VOCABULARY",
            "the adapters add different tokens to the vocabulary: one id would mean two of them",
            have=[f"{name}: {', '.join(f'{t} = {i}' for t, i in tokens.items())}" for name, tokens in added.items()],
            fix="use them one at a time, or train them with the same added tokens",
        )
