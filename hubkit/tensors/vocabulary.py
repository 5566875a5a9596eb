"""Rows of single tokens: tokens that the base does not have, and new rows for some that it has.

    E'[i] = row_i        of the embedding table and, where it is not tied to that, of the output head

An adapter holds these rows alone. Ids beyond the base's table never reach it: a hook looks their rows up here, and
another one lengthens the logits. The rows of several adapters add up like any change, Σ wᵢ (rowᵢ - E[i]), where a row
that the base does not have counts as zero. Files hold the rows themselves, as PEFT's ``trainable_token_indices`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.errors import HubkitError
from hubkit.tensors import mix as mixes
from hubkit.tensors.delta import Delta, accumulation_dtype
from hubkit.tensors.device import indices
from hubkit.tensors.parts import Part
from hubkit.tensors.site import Site

if TYPE_CHECKING:
    from hubkit.tensors.adapter import Adapter
    from hubkit.tensors.base import Base
    from hubkit.tensors.mix import Mix

ROWS = "rows"
"""The kind of the virtual sites where rows of tokens act."""
SUFFIX = ".token_adapter"
_IDS = "_hubkit_ids"


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
        self.rows = nn.Parameter(torch.empty(len(self.ids), size_of(site)[1]))

    @property
    def added(self) -> dict[str, int]:
        """Token -> id, of those that the adapter adds."""
        return dict(zip(self.names, self.ids[len(self.ids) - len(self.names) :], strict=True))

    def reset(self, site: Site, base: Base, generator: torch.Generator) -> None:
        """The base's own rows; the mean of all rows for a token that it does not have."""
        table = rows_of(site)
        self.rows.copy_(table.to(self.rows.dtype).mean(0).expand_as(self.rows))
        known = [at for at, i in enumerate(self.ids) if i < table.shape[0]]
        self.rows[known] = table[[self.ids[at] for at in known]].to(self.rows)


def rows_of(site: Site) -> Tensor:
    """The weight of a table or head with one row per token, (vocabulary, hidden)."""
    return site.weight().t() if site.transposed else site.weight()


def size_of(site: Site) -> tuple[int, int]:
    """(vocabulary, hidden) of a table or head."""
    return (site.shape[1], site.shape[0]) if site.transposed else site.shape


def row_sites(sites: Mapping[str, Site], table: Site | None, is_head: Callable[[str], bool]) -> dict[str, Site]:
    """The virtual sites beside the embedding table and beside an output head that is not tied to it."""
    if table is None:
        return {}
    heads = [s for s in sites.values() if is_head(s.name) and not s.tied and s.shape == size_of(table)]
    return {s.name + SUFFIX: replace(s, name=s.name + SUFFIX, kind=ROWS) for s in [table, *heads[:1]]}


def token_rows(base: Base, ids: Sequence[int], names: Sequence[str]) -> dict[str, Part]:
    """The parts that hold the rows of the tokens `ids`, the last of which are called `names`.

    Raises:
        HubkitError: ``HK-VOCABULARY`` for ids that cannot be, or a base without a table.
    """
    sites = base.rows
    if not ids and not names:
        return {}
    size = size_of(next(iter(sites.values())))[0] if sites else 0
    beyond = sorted(i for i in ids if i >= size)
    wrong = [] if sites else ["the base has no table of embeddings"]
    wrong += [] if len(set(ids)) == len(ids) and min(ids, default=0) >= 0 else ["an id twice, or below 0"]
    wrong += [] if len(set(names)) == len(names) <= len(ids) else [f"{len(set(names))} tokens for {len(ids)} ids"]
    wrong += [] if beyond == list(range(size, size + len(beyond))) else [f"ids {beyond} beyond {size} rows: a gap"]
    wrong += [] if set(beyond) <= set(ids[len(ids) - len(names) :]) else ["new rows without the tokens' names"]
    if wrong:
        raise HubkitError(
            "HK-VOCABULARY", "these rows cannot be added to the base's vocabulary", where=base.source, have=wrong,
            want="the tokens that its tokenizer does not have, and the next free ids",
            fix="--set add_tokens=NAMES lets hubkit train find the ids",
        )  # fmt: skip
    return {name: TokenRows(site, ids, names) for name, site in sites.items()}


@dataclass(frozen=True)
class VocabularyPlan:
    """What one mix does to single rows.

    Args:
        members: name of a virtual site -> its parts, each with its weight.
        base: the base they act in.
        size: rows of the tables under this mix.
    """

    members: Mapping[str, Sequence[tuple[TokenRows, float]]]
    base: Base
    size: int

    def at(self, site: Site) -> Site | None:
        """The virtual site whose rows act at the table or head `site`; a tied head has its table's."""
        same = (virtual for name, virtual in self.base.rows.items() if name in self.members)
        return next((v for v in same if v.name == site.name + SUFFIX or (site.tied and v.tensor == site.tensor)), None)

    def change(self, virtual: Site) -> tuple[list[int], Tensor]:
        """Ids, sorted, and what is added to their rows, (n, hidden), accumulated wide."""
        members = self.members[virtual.name]
        ids = sorted({i for part, _ in members for i in part.ids})
        place, wide = {i: at for at, i in enumerate(ids)}, accumulation_dtype(virtual.dtype)
        old = size_of(virtual)[0]
        total = torch.zeros(len(ids), size_of(virtual)[1], dtype=wide, device=virtual.device)
        for part, weight in members:
            known = [at for at, i in enumerate(part.ids) if i < old]
            rows = part.rows.to(wide)
            if known:
                own = rows_of(virtual).index_select(0, indices(tuple(part.ids[at] for at in known), rows.device))
                before = torch.zeros_like(rows).detach()
                rows = rows - before.index_copy_(0, indices(tuple(known), rows.device), own.to(wide))
            total = total.index_add(0, indices(tuple(place[i] for i in part.ids), rows.device), rows * weight)
        return ids, total

    def longer(self, site: Site, weight: Tensor) -> Tensor:
        """The merged weight of `site` as it is stored, (vocabulary, hidden), with the rows of added tokens below it."""
        virtual = self.at(site)
        if virtual is None or self.size == weight.shape[0]:
            return weight
        ids, change = self.change(virtual)
        added = change[[at for at, i in enumerate(ids) if i >= weight.shape[0]]].detach()
        return torch.cat([weight, added.to(weight.dtype)])


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
    own = rows_of(replace(site, change=None, wide=True))
    known = [at for at, i in enumerate(part.ids) if i < own.shape[0]]
    if not known:
        return None
    ids = indices(tuple(part.ids[at] for at in known), own.device)
    dense = torch.zeros(own.shape, dtype=own.dtype, device=own.device)
    rows = part.rows if grad else part.rows.detach()
    dense = dense.index_copy(0, ids, rows.index_select(0, indices(tuple(known), rows.device)).to(own) - own[ids])
    return Delta.full(dense.t() if site.transposed else dense)


def plan_vocabulary(mix: Mix, adapters: Mapping[str, Adapter], base: Base) -> VocabularyPlan | None:
    """What `mix` does to single rows of `base`; None where it has no such part.

    Raises:
        HubkitError: ``HK-VOCABULARY`` when members add different tokens: one id would mean two of them.
    """
    members: dict[str, list[tuple[TokenRows, float]]] = {}
    for name, weight in mixes.leaves(mix):
        for site, part in adapters[name].parts.items():
            if isinstance(part, TokenRows):
                members.setdefault(site, []).append((part, weight))
    if not members:
        return None
    used = {name: adapters[name] for name in mixes.names(mix)}
    require_one_vocabulary({name: added_by(adapter.parts.values()) for name, adapter in used.items()})
    ids = [i for parts in members.values() for part, _ in parts for i in part.ids]
    return VocabularyPlan(members, base, max(size_of(base.rows[next(iter(members))])[0], *(i + 1 for i in ids)))


def added_by(parts: Iterable[Part]) -> dict[str, int]:
    """Token -> id, of the tokens that an adapter of these parts adds."""
    return next((part.added for part in parts if isinstance(part, TokenRows)), {})


def require_one_vocabulary(added: Mapping[str, Mapping[str, int]]) -> None:
    """Refuses adapters that add different tokens: ``HK-VOCABULARY``. Those that add none fit any."""
    kinds = {tuple(sorted(tokens.items())) for tokens in added.values() if tokens}
    if len(kinds) > 1:
        raise HubkitError(
            "HK-VOCABULARY", "the adapters add different tokens to the vocabulary: one id would mean two of them",
            have=[f"{name}: {', '.join(f'{t} = {i}' for t, i in tokens.items())}" for name, tokens in added.items()],
            fix="use them one at a time, or train them with the same added tokens",
        )  # fmt: skip


class VocabularyHooks:
    """The hooks on one model that look rows of tokens up in an adapter and lengthen its logits.

    Args:
        model: the live base.
        base: its sites.
        active: the plan of the forward that is running, or None.
    """

    def __init__(self, model: nn.Module, base: Base, active: Callable[[], VocabularyPlan | None]) -> None:
        self._active, self._model = active, model
        self._table = next(base.sites[s.name.removesuffix(SUFFIX)] for s in base.rows.values() if s.transposed)
        size = size_of(self._table)
        self._head = next((s for s in base.sites.values() if base.arch.is_head(s.name) and s.shape == size), None)
        assert self._table.module is not None, "only a live site has a module"
        self._first = [
            model.register_forward_pre_hook(self._widen, with_kwargs=True),
            model.register_forward_hook(self._narrow, with_kwargs=True, always_call=True),
            self._table.module.register_forward_pre_hook(self._before, with_kwargs=True),
        ]
        self._own: int = self._config().vocab_size
        self._last: list[torch.utils.hooks.RemovableHandle] = []
        self.last()

    def last(self) -> None:
        """Puts the hooks that write rows and logits behind those of all parts."""
        for handle in self._last:
            handle.remove()
        pairs = ((self._table, self._look_up), (self._head, self._lengthen))
        self._last = [
            site.module.register_forward_hook(hook, with_kwargs=True)
            for site, hook in pairs
            if site is not None and site.module is not None
        ]

    def remove(self) -> None:
        """Takes all hooks off."""
        for handle in (*self._first, *self._last):
            handle.remove()

    def _config(self) -> Any:
        config: Any = self._model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    def _widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        plan = self._active()
        if plan is not None:  # the model's own loss reads it
            self._config().vocab_size = plan.size

    def _narrow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._config().vocab_size = self._own

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan = self._active()
        if plan is None:
            return None
        ids: Tensor = args[0] if args else kwargs["input"]
        known = ids.masked_fill(ids >= size_of(self._table)[0], 0)
        setattr(known, _IDS, ids)
        return ((known, *args[1:]), kwargs) if args else ((), {**kwargs, "input": known})

    def _look_up(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        from hubkit.tensors.additive import forward_with

        plan = self._active()
        virtual = None if plan is None else plan.at(self._table)
        if plan is None or virtual is None:
            return None
        known = args[0] if args else kwargs["input"]
        tokens: Tensor = getattr(known, _IDS, known)
        ids, change = plan.change(virtual)
        places = torch.full((plan.size,), len(ids), device=tokens.device)
        places.index_copy_(0, indices(tuple(ids), tokens.device), torch.arange(len(ids), device=tokens.device))
        padded = torch.cat([change, change.new_zeros(1, change.shape[1])])
        added = forward_with(module, places[tokens], padded, None, padding_idx=None)
        beyond = (tokens >= size_of(self._table)[0])[..., None]
        return (y.to(change.dtype).masked_fill(beyond, 0.0) + added).to(y.dtype)

    def _lengthen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
        plan = self._active()
        virtual = None if plan is None or self._head is None else plan.at(self._head)
        if plan is None or virtual is None:
            return None
        x: Tensor = args[0] if args else kwargs["input"]
        ids, change = plan.change(virtual)
        logits = F.linear(x, change.to(x.dtype)).to(y.dtype)
        count = sum(i < y.shape[-1] for i in ids)
        if count:
            y = y.index_add(-1, indices(tuple(ids[:count]), y.device), logits[..., :count])
        return torch.cat([y, logits[..., count:]], -1)
