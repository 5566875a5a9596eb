"""`compose`: several adapters written as one, their exact weighted sum.

    Δ = Σ wᵢ · sᵢ · Bᵢ Aᵢ      A = rows of all Aᵢ,  B = columns of all wᵢ sᵢ Bᵢ,  scale 1

Any ranks, scales, signs and patterns; computed and stored in fp32, so that nothing of a member is rounded away. Sites
of lower rank than the largest are padded with zeros: one rank and one scale, which every engine reads alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import CARD_NAME, TENSORS_NAME, tensors_bytes, write_adapter
from hubkit.documents.manifest import Manifest, Parent, Plugin
from hubkit.errors import HubkitError
from hubkit.verbs.sources import Progress, chosen_name
from hubkit.verbs.terms import Term, Terms, mix_of, open_terms

if TYPE_CHECKING:
    from hubkit.methods.host import Method
    from hubkit.tensors.adapter import Adapter
    from hubkit.tensors.base import Base
    from hubkit.tensors.delta import Delta


@dataclass(frozen=True)
class Composed:
    """A composed adapter.

    Args:
        path: its folder.
        digest: its identity.
        rank: of every site.
        sites: number of sites.
        parents: what it was made of.
        overrides: named overrides used.
    """

    path: Path
    digest: str
    rank: int
    sites: int
    parents: tuple[Parent, ...]
    overrides: tuple[str, ...]


def compose(
    terms: Terms,
    out: Path | str,
    *,
    name: str | None = None,
    license: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Composed:
    """Writes the weighted sum of adapters as an ordinary adapter.

    Args:
        terms: ``{"./a": 1.0, "org/b@v2": -0.5}`` or the text ``"1.0*./a + -0.5*org/b@v2"``.
        out: the new adapter's folder.
        name: its name; the folder's by default.
        license: SPDX identifier.
        allow_base_mismatch: add adapters of different bases; recorded.
        replace: replace an adapter that is at `out`.

    Raises:
        HubkitError: ``HK-TERMS``; ``HK-NAME``; ``HK-BASE-MISMATCH``; ``HK-COMPOSE`` when a member's change is not
            low-rank; ``HK-EXISTS``; what pulling and reading raise.
    """
    from hubkit.artifact.card import card_file
    from hubkit.methods.config import config_document
    from hubkit.methods.foreign import own_files

    out = Path(out)
    name = chosen_name(name, out)
    members = open_terms(terms, registry=registry, offline=offline, progress=progress)
    overrides = _one_base(members, allow_base_mismatch)
    base = _base(members)
    adapters = _read(members, base)
    result, rank = _sum(name, members, adapters, base)
    parents = tuple(Parent(m.reference, m.folder.manifest.digest, m.weight) for m in members)
    first = members[0].folder
    manifest = Manifest(
        kind="adapter",
        name=result.name,
        method=result.method.name,
        plugin=_plugin(result),
        config=config_document(result.config),
        base=first.manifest.base,
        parents=parents,
        license=license,
        overrides=overrides,
    ).shareable()
    assert manifest.base is not None
    result.source, result.revision = manifest.base.source, manifest.base.revision
    files: dict[str, bytes | Path] = {**own_files(result), TENSORS_NAME: tensors_bytes(first.base_tensors() or ())}
    files[CARD_NAME] = card_file(manifest, files)
    made = write_adapter(out, manifest, files, replace=replace)
    return Composed(out, made.digest, rank, len(result.parts), made.parents, overrides)


def _one_base(members: list[Term], allow: bool) -> tuple[str, ...]:
    """All members belong to the base of the first.

    Raises:
        HubkitError: ``HK-BASE-MISMATCH``, ``HK-BASE-UNPROVEN``.
    """
    from hubkit.artifact.digest import BaseRecord
    from hubkit.verbs.terms import require_base

    first = members[0].folder
    if first.manifest.base is None:
        require_base(members[:1], BaseRecord(_nothing(), ()), allow)
    assert first.manifest.base is not None
    record = BaseRecord(first.manifest.base, first.base_tensors() or ())
    vocabularies = [m.name for m in members if m.folder.manifest.vocabulary]
    if vocabularies:
        raise HubkitError("HK-COMPOSE", "members that add tokens to the vocabulary cannot be summed", have=vocabularies)
    return require_base(members[1:], record, allow)


def _nothing() -> Any:
    from hubkit.documents.manifest import BaseFingerprint

    return BaseFingerprint(None, None, "", None, {}, {}, None, None)


def _base(members: list[Term]) -> Base:
    from hubkit.methods.reading import recorded_base

    return recorded_base(members[0].folder)


def _read(members: list[Term], base: Base) -> Mapping[str, Adapter]:
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.parts import LowRank

    adapters = {m.name: read_adapter(m.folder, base, name=m.name, dtype="master") for m in members}
    others = [n for n, a in adapters.items() if not all(isinstance(p, LowRank) for p in a.parts.values())]
    others += [n for n, a in adapters.items() if a.method.unmergeable and n not in others]
    if others:
        raise HubkitError(
            "HK-COMPOSE", "only adapters whose change is low-rank can be written as one", have=[
                f"{n}: {adapters[n].method.name}" for n in others
            ], fix="keep them apart: hubkit generate and hubkit merge take several adapters at once",
        )  # fmt: skip
    return adapters


def _sum(name: str, members: list[Term], adapters: Mapping[str, Adapter], base: Base) -> tuple[Adapter, int]:
    import torch

    from hubkit.artifact.forms import short_targets
    from hubkit.tensors import mix as mixes
    from hubkit.tensors.adapter import Adapter

    mix = mix_of(members, "sum")
    deltas: dict[str, Delta] = {}
    with torch.no_grad():
        for site in base.sites.values():
            delta = mixes.delta(mix, site, lambda n, at: adapters[n].delta(at))
            if delta is not None and delta.right is not None:
                deltas[site.name] = delta
    rank = max(int(d.right.shape[0]) for d in deltas.values() if d.right is not None)
    method = _method(adapters)
    low_rank = method.info.low_rank
    assert low_rank is not None
    config = low_rank(tuple(short_targets(deltas, base.sites)), rank)
    values = {site: _factors(delta, rank) for site, delta in deltas.items()}
    return Adapter.of_factors(name, method, config, base, values), rank


def _factors(delta: Delta, rank: int) -> dict[str, Any]:
    """A (rank, in) and B (out, rank), padded with zeros."""
    from torch.nn.functional import pad

    assert delta.left is not None
    assert delta.right is not None
    missing = rank - int(delta.right.shape[0])
    return {"A": pad(delta.right, (0, 0, 0, missing)), "B": pad(delta.left, (0, missing))}


def _method(adapters: Mapping[str, Adapter]) -> Method:
    """A method that can hold any low-rank change: a member's own, else any that is installed.

    Raises:
        HubkitError: ``HK-COMPOSE``.
    """
    from hubkit.methods.host import host

    for name in [*(a.method.name for a in adapters.values()), host().default()]:
        method = host().load(name)
        if method.info.low_rank is not None:
            return method
    raise HubkitError("HK-COMPOSE", "no installed method can hold a low-rank change as it is")


def _plugin(adapter: Adapter) -> Plugin:
    from hubkit.methods.host import host

    offer = host().load(adapter.method.name).offer
    return Plugin(offer.distribution, offer.version)
