"""The adapters that `compose` and `extract` write: low-rank factors where they say everything, else whole tensors.

Sites of lower rank than the largest are padded with zeros: one rank and one scale, which every engine reads alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hubkit.documents.manifest import Plugin
from hubkit.errors import HubkitError
from hubkit.methods.host import host

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.methods.host import Method
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.tied import Tied
    from hubkit.tensors.weights.composing import ComposeOptions, Composition


def make(
    weights: list[tuple[str, float]], adapters: Mapping[str, Adapter], base: Base, how: ComposeOptions
) -> tuple[Composition, ComposeOptions]:
    """The new deltas, and the options they were made with.

    An operator that prunes makes every delta dense: its result has the members' largest rank where none is given and
    all of them are low-rank.
    """
    from hubkit.tensors.parts.part import LowRank
    from hubkit.tensors.weights.composing import compose_deltas

    parts = [part for adapter in adapters.values() for part in adapter.parts.values()]
    ranks = [int(part.A.shape[0]) for part in parts if isinstance(part, LowRank)]
    if how.operator.prunes and not how.cuts and len(ranks) == len(parts):
        how = replace(how, rank=max(ranks))
    of = lambda member, site: adapters[member].delta(site)  # noqa: E731
    return compose_deltas(base.sites.values(), weights, of, how), how


def record(how: ComposeOptions, made: Composition) -> Mapping[str, Any]:
    """The composition as the manifest tells it; energies to six digits, which every machine agrees on."""
    said: dict[str, Any] = {"operator": how.operator.name, "energy": round(made.energy, 6)}
    if not made.whole:
        said["rank"] = made.rank
    if how.cuts:
        said |= {"least_energy": round(made.least, 6), "least_energy_site": made.least_site}
    if how.energy is not None:
        said["energy_wanted"] = how.energy
    if how.operator.prunes:
        said |= {"density": how.density, "seed": how.seed}
    return said


def adapter_of(name: str, made: Composition, adapters: Mapping[str, Adapter], base: Base) -> Adapter:
    """The composed adapter, of a method that can hold it.

    Raises:
        HubkitError: ``HK-COMPOSE`` where no installed method can; ``HK-NAN``.
    """
    if made.whole:
        result = _whole(name, made, adapters, base)
    else:
        result = low_rank_adapter(name, made.factors, made.rank, adapters, base)
    result.require_finite(name)
    return result


def extracted(
    name: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    whole: Mapping[str, Mapping[str, Tensor]],
    tied: Tied,
    base: Base,
) -> Adapter:
    """The adapter that adds `factors` and holds some modules whole.

    Args:
        factors: site -> (left (out, k), right (k, in)), k up to the adapter's rank.
        whole: site -> role -> all that the module holds, laid out as it stores it; on the meta device where only the
            names of the adapter's tensors are wanted.
        tied: whether a tied head follows its table.

    Raises:
        HubkitError: ``HK-COMPOSE`` where no installed method can hold it.
    """
    from hubkit.methods.reading import planned
    from hubkit.tensors.base.targets import short_names
    from hubkit.tensors.parts.adapter import Adapter

    rank = max((int(right.shape[0]) for _, right in factors.values()), default=0)
    values = {**whole, **{site: _factors(left, right, rank) for site, (left, right) in factors.items()}}
    targets, saved = (tuple(short_names(chosen, base.sites)) for chosen in (factors, whole))
    tensors = tuple(sorted(f"{site}.{role}" for site, roles in whole.items() for role in roles))

    def configured(method: Method) -> Any | None:
        config = method.low_rank(targets, rank, saved, tied) if rank else method.whole(tensors, tied, "values")
        fits = config is not None and values.keys() <= planned(method, config, base).sites.keys()
        return config if fits else None  # one that leaves `saved` out does not

    method, config = _holder({}, configured, "the difference")
    return Adapter.of_factors(name, method, config, base, values)


def plugin_of(adapter: Adapter) -> Plugin:
    """Who offers the method of an adapter."""
    offer = host().load(adapter.method.name).offer
    return Plugin(offer.distribution, offer.version)


def low_rank_adapter(
    name: str, factors: Mapping[str, tuple[Tensor, Tensor]], rank: int, adapters: Mapping[str, Adapter], base: Base
) -> Adapter:
    """The adapter that adds `factors`: one rank, scale 1, of a method of `adapters` or any that can hold it.

    Args:
        factors: site -> (left (out, k), right (k, in)), k up to `rank`.

    Raises:
        HubkitError: ``HK-COMPOSE`` where no installed method can.
    """
    from hubkit.tensors.base.targets import short_names
    from hubkit.tensors.parts.adapter import Adapter

    targets = tuple(short_names(factors, base.sites))
    method, config = _holder(adapters, lambda method: method.low_rank(targets, rank), "a low-rank change")
    values = {site: _factors(left, right, rank) for site, (left, right) in factors.items()}
    return Adapter.of_factors(name, method, config, base, values)


def _factors(left: Tensor, right: Tensor, rank: int) -> dict[str, Tensor]:
    """A (rank, in) and B (out, rank), padded with zeros."""
    from torch.nn.functional import pad

    missing = rank - int(right.shape[0])
    return {"A": pad(right, (0, 0, 0, missing)), "B": pad(left, (0, missing))}


def _whole(name: str, made: Composition, adapters: Mapping[str, Adapter], base: Base) -> Adapter:
    from hubkit.tensors.parts.adapter import Adapter

    values: dict[str, dict[str, Tensor]] = {
        site: {"weight": left @ right} for site, (left, right) in made.factors.items()
    }
    for site, delta in made.whole.items():
        roles = {"weight": delta.dense, "bias": delta.bias}
        values[site] = {role: value.contiguous() for role, value in roles.items() if value is not None}
    tied = _tie(values, adapters, base)
    tensors = tuple(sorted(f"{site}.{role}" for site, roles in values.items() for role in roles))
    method, config = _holder(adapters, lambda method: method.whole(tensors, tied), "a change of whole tensors")
    return Adapter.of_factors(name, method, config, base, values)


def _tie(values: dict[str, dict[str, Tensor]], adapters: Mapping[str, Adapter], base: Base) -> Tied:
    """Whether a tied output head follows its table: when it does so in every member; its change is then the table's."""
    from hubkit.tensors.parts.tied import keeps_tie, tied_pairs

    tied: Tied = "keep"
    for head, table in tied_pairs(base).items():
        if "weight" not in {**values.get(head, {}), **values.get(table, {})}:
            continue
        if not all(keeps_tie(a.parts, base, base.site(head)) for a in adapters.values()):
            tied = "break"
            continue
        values.get(head, {}).pop("weight", None)
        if head in values and not values[head]:
            del values[head]
    return tied


def _holder(
    adapters: Mapping[str, Adapter], configured: Callable[[Method], Any | None], what: str
) -> tuple[Method, Any]:
    """A method that can hold a change, and its configuration for it: a member's own, else any that is installed.

    Raises:
        HubkitError: ``HK-COMPOSE``.
    """
    for name in _candidates(adapters):
        try:
            method = host().load(name)
        except HubkitError:
            continue  # a broken plugin that no member needs
        if (config := configured(method)) is not None:
            return method, config
    raise HubkitError("HK-COMPOSE", f"no installed method can hold {what} as it is")


def _candidates(adapters: Mapping[str, Adapter]) -> Iterator[str]:
    """Names of methods: the members' own, the default, all that are installed; each looked up when it is needed."""
    yield from dict.fromkeys(a.method.name for a in adapters.values())
    yield host().default()
    yield from host().offers()
