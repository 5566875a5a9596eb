"""`compose`: several adapters written as one.

    Δ = Σ wᵢ · sᵢ · Bᵢ Aᵢ      A = rows of all Aᵢ,  B = columns of all wᵢ sᵢ Bᵢ,  scale 1

The exact sum of any ranks, scales, signs and patterns by default; else what an operator of
`tensors/weights/operators.py` makes of the deltas, or the best approximation of a given rank. Computed and stored in
fp32, so that nothing of a member is rounded away. A change that is not low-rank (a row rescaled, a bias, a weight
trained whole) makes the sum one of whole tensors, unless a rank says how far to approximate it. What writes the result
is `hubkit.methods.composed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import CARD_NAME, TENSORS_NAME, quantized_for, tensors_bytes, write_adapter
from hubkit.documents.arguments import checked
from hubkit.documents.licenses import require_license
from hubkit.documents.manifest import Manifest, Parent
from hubkit.documents.schema import canonical, sha256
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import chosen_name
from hubkit.named.terms import Term, Terms, as_sum, open_terms
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.weights.composing import ComposeOptions
    from hubkit.tensors.weights.interference import Interference


@dataclass(frozen=True, repr=False)
class Composed(Shown):
    """A composed adapter.

    Args:
        path: its folder; None where only a report was asked for, and with it everything up to `overrides` is empty.
        digest: its identity.
        rank: of every site; 0 where whole tensors hold what no low-rank factors can.
        sites: number of sites.
        parents: what it was made of.
        composition: how, as its manifest says it: operator, density, seed, rank, energy kept.
        overrides: named overrides used.
        report: the page that was written.
        interference: how the members get in each other's way, where a report was asked for.
    """

    path: Path | None
    digest: str
    rank: int
    sites: int
    parents: tuple[Parent, ...]
    composition: Mapping[str, Any]
    overrides: tuple[str, ...]
    report: Path | None = None
    interference: Interference | None = None


@checked
def compose(
    terms: Terms,
    out: Path | str | None,
    *,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
    rank: int | None = None,
    energy: float | None = None,
    report: Path | str | None = None,
    base: Path | str | None = None,
    revision: str | None = None,
    name: str | None = None,
    license: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Composed:
    """Writes several adapters as one ordinary adapter.

    Args:
        terms: ``{"./a": 1.0, "org/b@v2": -0.5}`` or the text ``"1.0*./a + -0.5*org/b@v2"``.
        out: the new adapter's folder; None to write the report alone.
        method: ``sum`` (exact), ``average``, ``ties``, ``dare``, ``dare-ties`` or ``magnitude``.
        density: part of the entries that the last four keep, in (0, 1].
        seed: of what is drawn at random.
        rank: the largest rank: the best approximation is written. Of operators that prune, the largest rank among the
            members by default, where all of them are low-rank.
        energy: the part of the energy, ‖Δ_k‖² / ‖Δ‖², that every site keeps: the smallest one rank that does is taken,
            at most `rank`.
        report: an HTML page that shows, site by site, how the members get in each other's way.
        base: folder or repository of the base, for members whose method computes its change from the base's weights.
        revision: of the base.
        name: its name; the folder's by default.
        license: SPDX identifier.
        allow_base_mismatch: add adapters of different bases; recorded.
        replace: replace an adapter that is at `out`, and a page that is at `report`.

    Raises:
        HubkitError: ``HK-OPERATOR``, ``HK-DENSITY``, ``HK-RANK``, ``HK-ENERGY``; ``HK-TERMS``; ``HK-NAME``;
            ``HK-BASE-MISMATCH``; ``HK-VOCABULARY``; ``HK-BASE-NEEDED``; ``HK-COMPOSE`` for a member that has no weights
            to add, and for the change of a bias or norm where a rank is asked for; ``HK-NAN``; ``HK-EXISTS``; what
            pulling and reading raise.
    """
    from hubkit.tensors.parts.heads import with_body
    from hubkit.tensors.weights.composing import compose_options
    from hubkit.verbs.interference import require_page, write_page

    require_license(license)
    how = compose_options(method, density, seed, rank, energy)
    if out is None and report is None:
        raise HubkitError("HK-USAGE", "nothing is to be written", want="--out, --report or both", status=USAGE)
    page = None if report is None else require_page(Path(report), replace)
    name = None if out is None else chosen_name(name, Path(out))
    where = Where(registry, offline, progress)
    members = as_sum(open_terms(terms, where), method)
    overrides = _one_base(members, allow_base_mismatch)
    task = one_task(members)
    sites, used = _base(members, base, revision, allow_base_mismatch, where)
    sites = with_body(sites, task)
    overrides = tuple(dict.fromkeys((*overrides, *used)))
    adapters = _read(members, sites)
    found = None if page is None else _compare(members, adapters, sites)
    parents = tuple(Parent(m.reference, m.folder.manifest.digest, m.weight) for m in members)
    done = Composed(None, "", 0, 0, parents, {}, overrides, page, found)
    if out is not None and name is not None:
        done = _write(done, Path(out), name, license, members, adapters, sites, how, replace)
    if page is not None and found is not None:
        write_page(page, found)
    return done


def _write(
    plan: Composed,
    out: Path,
    name: str,
    license: str | None,
    members: list[Term],
    adapters: Mapping[str, Adapter],
    base: Base,
    how: ComposeOptions,
    replace: bool,
) -> Composed:
    from dataclasses import replace as changed

    from hubkit.artifact.card import card_file
    from hubkit.methods.composed import adapter_of, make, plugin_of, record
    from hubkit.methods.config import config_document
    from hubkit.methods.foreign import own_files

    made, how = make([(m.name, m.weight) for m in members], adapters, base, how)
    result = adapter_of(name, made, adapters, base)
    result.task, first = one_task(members), members[0].folder
    assert first.manifest.base is not None
    codec, compute_dtype = quantized_for(member.folder for member in members)
    manifest = Manifest(
        kind="adapter",
        name=result.name,
        method=result.method.name,
        plugin=plugin_of(result),
        config=config_document(result.config),
        base=changed(first.manifest.base, codec=codec, compute_dtype=compute_dtype),
        parents=plan.parents,
        composition=record(how, made),
        task=result.task,
        license=license,
        overrides=plan.overrides,
    ).shareable()
    assert manifest.base is not None
    result.source, result.revision = manifest.base.source, manifest.base.revision
    files: dict[str, bytes | Path] = {**own_files(result), TENSORS_NAME: tensors_bytes(first.base_tensors() or ())}
    files[CARD_NAME] = card_file(manifest, files)
    written = write_adapter(out, manifest, files, replace=replace)
    return changed(
        plan,
        path=out,
        digest=written.digest,
        rank=0 if made.whole else made.rank,
        sites=len(result.parts),
        parents=written.parents,
        composition=written.composition or {},
    )


def one_task(members: Sequence[Term]) -> Mapping[str, Any] | None:
    """What all members were trained for, as manifests say it, without its scores; None: language models.

    Raises:
        HubkitError: ``HK-COMPOSE`` for members of several tasks.
    """
    said = [{k: v for k, v in (m.folder.manifest.task or {}).items() if k != "scores"} for m in members]
    if any(one != said[0] for one in said):
        have = [f"{m.name}: {one.get('kind', 'no task')}" for m, one in zip(members, said, strict=True)]
        what, want = "the members were trained for several tasks", "one task, the same labels"
        raise HubkitError("HK-COMPOSE", what, want=want, have=have, fix="keep them apart")
    return said[0] or None


def _one_base(members: list[Term], allow: bool) -> tuple[str, ...]:
    """All members belong to the base of the first, and add the same tokens to its vocabulary.

    Raises:
        HubkitError: ``HK-BASE-MISMATCH``, ``HK-BASE-UNPROVEN``, ``HK-VOCABULARY``.
    """
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.named.terms import require_base

    first = members[0].folder
    assert first.manifest.base is not None
    record = BaseRecord(first.manifest.base, first.base_tensors() or ())
    used = require_base(members[1:], record, allow)
    vocabularies = [m.folder.manifest.vocabulary for m in members]
    if any(one != vocabularies[0] for one in vocabularies):
        raise HubkitError(
            "HK-VOCABULARY",
            "the members add other tokens to the vocabulary: one id would mean several things",
            want="the same added tokens with the same ids in every member",
            have=[f"{m.name}: {_counted(m.folder.manifest.vocabulary)}" for m in members],
            fix="keep them apart, or train them with the same added tokens",
        )
    if vocabularies[0]:
        have = [m.name for m in members]
        raise HubkitError("HK-COMPOSE", "members that add tokens to the vocabulary cannot be summed", have=have)
    return used


def _counted(vocabulary: Mapping[str, Any] | None) -> str:
    """The added vocabulary of one member, shortened, for a message."""
    if not vocabulary:
        return "none"
    text = canonical(vocabulary).decode()
    return text if len(text) <= 80 else f"{text[:60]}... ({sha256(text.encode())[:14]}..)"


def _base(
    members: list[Term], base: Path | str | None, revision: str | None, allow: bool, where: Where
) -> tuple[Base, tuple[str, ...]]:
    """The members' base, with its weights where `base` names it; and the overrides that this needed."""
    from hubkit.methods.reading import recorded_base
    from hubkit.named.sources import base_with_record
    from hubkit.named.terms import require_base

    if base is None:
        return recorded_base(members[0].folder), ()
    from hubkit.tensors.base.base import Base

    source, record = base_with_record(base, revision, where)
    return Base.from_folder(source.path), require_base(members, record, allow)


def _read(members: list[Term], base: Base) -> Mapping[str, Adapter]:
    from hubkit.methods.reading import read_adapter

    adapters = {m.name: read_adapter(m.folder, base, name=m.name, dtype="master") for m in members}
    reasons = [f"{name}: {reason}" for name, a in adapters.items() if (reason := a.method.unmergeable)]
    if reasons:
        raise HubkitError(
            "HK-COMPOSE",
            "only adapters that change weights can be written as one",
            have=reasons,
            fix="keep them apart: hubkit generate takes several adapters at once",
        )
    return adapters


def _compare(members: list[Term], adapters: Mapping[str, Adapter], base: Base) -> Interference:
    from hubkit.tensors.weights.interference import interference

    weights = [(m.name, m.weight) for m in members]
    return interference(base.sites.values(), weights, lambda member, site: adapters[member].delta(site))
