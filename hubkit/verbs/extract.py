"""`extract`: the difference of two checkpoints as an adapter on the first of them.

A full fine-tune, a merged model, somebody's checkpoint becomes a versioned adapter. Linear layers become low-rank
factors; norms and embeddings that changed are held whole beside them, as PEFT's ``modules_to_save``. Nothing that
changed is left out without being asked for. What did not change is known by its digest and not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.artifact.folder import CARD_NAME, TENSORS_NAME, WEIGHTS_NAME, Source, check_adapter, tensors_bytes
from hubkit.artifact.folder import write_adapter as write
from hubkit.documents.arguments import checked
from hubkit.documents.licenses import require_license
from hubkit.documents.manifest import Manifest, shareable
from hubkit.documents.schema import canonical
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError
from hubkit.named.sources import base_with_record, chosen_name
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where

if TYPE_CHECKING:
    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.files.shards import Shards
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.weights.between import Between, Moved
    from hubkit.tensors.weights.extracting import ExtractedSite, ExtractOptions

SITES_NAME = "extraction.json"
PARTIAL = "partial"


@dataclass(frozen=True, repr=False)
class Extraction(Shown):
    """An extracted adapter.

    Args:
        path: its folder.
        digest: its identity.
        rank: of its factors; 0 where it holds whole modules alone.
        sites: what was found at each module whose weight became factors.
        whole: modules that are held whole.
        left_out: what changed and is in no adapter, in words.
        notes: what else differs and stays the base's: tokenizer, chat template.
        overrides: named overrides used.
    """

    path: Path
    digest: str
    rank: int
    sites: tuple[ExtractedSite, ...]
    whole: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """What is made of the differences: low-rank factors, whole modules, and what neither can hold."""

    low: tuple[Moved, ...]
    whole: tuple[Moved, ...]
    left: tuple[str, ...]


@checked
def extract(
    base: Path | str,
    tuned: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
    partial: bool = False,
    dtype: str | None = None,
    seed: int = 0,
    name: str | None = None,
    license: str | None = None,
    revision: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Writes what `tuned` changed in `base` as an adapter.

    Args:
        base: folder or repository of the base.
        tuned: folder or repository of a checkpoint with the same modules.
        out: the adapter's folder.
        rank: the largest rank of the factors. Directions that rounding alone may have made are not kept.
        energy: part of the energy above the rounding floor that every linear layer keeps, at the smallest rank that
            does; with `rank`, at most that.
        exact: hold every changed module whole instead: merged, the result is `tuned` bit for bit.
        partial: go on without what the adapter cannot hold; without `exact`, factors alone: norms and embeddings stay
            the base's. Recorded.
        dtype: of the factors; float32 by default. Whole modules keep their own.
        seed: of the random columns that find the range of large differences.
        name: its name; the folder's by default.
        license: SPDX identifier.
        revision: of the base.
        replace: replace an adapter that is at `out`.

    Raises:
        HubkitError: ``HK-USAGE`` without any of rank, energy and exact; ``HK-RANK``, ``HK-ENERGY``, ``HK-DTYPE``;
            ``HK-SHAPE`` for checkpoints of other modules; ``HK-EXTRACT`` where more changed than the adapter holds;
            ``HK-EXTRACT-NOOP`` where nothing did; ``HK-BASE-FORMAT``, ``HK-NAN``, ``HK-NAME``, ``HK-EXISTS``; what
            pulling and reading raise.
    """
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.files.dtypes import dtype_named
    from hubkit.tensors.files.shards import open_shards
    from hubkit.tensors.weights.between import between, refuse_other_shapes
    from hubkit.tensors.weights.extracting import extract_options, require_numbers

    require_license(license)
    out, how = Path(out), extract_options(rank, energy, seed)
    wanted = dtype_named(dtype)
    _require_form(rank, energy, exact, dtype)
    name = chosen_name(name, out)
    where = Where(registry, offline, progress)
    pairs = (base_with_record(*one, where) for one in ((base, revision), (tuned, None)))
    (source, record), (other, tuned_record) = pairs
    overrides = (PARTIAL,) if partial else ()
    draft = Manifest("adapter", name, method="extract", base=record.fingerprint, license=license, overrides=overrides)
    check_adapter(out, draft, {}, replace=replace)
    shards, tuned_shards = open_shards(source.path), open_shards(other.path)
    mine, theirs = (Base.from_headers(s.headers, s.config, str(s.path), s.read) for s in (shards, tuned_shards))
    require_numbers(mine, theirs)
    found = between(mine, record.tensors, theirs, tuned_record.tensors)
    what = "the two checkpoints do not have the same modules: there is no difference to take"
    refuse_other_shapes(found, str(base), str(tuned), what, "the base that it was made from")
    plan, notes = _planned(found, record, tuned_record, exact, partial), _notes(record, tuned_record)
    _require_change(plan, found, str(base), str(tuned))
    if plan.left and not partial:
        raise _too_much(plan.left, exact)
    sites: tuple[ExtractedSite, ...] = ()
    weights: Source | None = None
    if exact:
        adapter, weights = _whole(name, plan, mine, theirs, tuned_shards)
    else:
        sites, adapter = _factors(name, plan, mine, theirs, how, wanted)
    left = (*plan.left, *(f"{one.site}: rounding alone" for one in sites if not one.rank))
    document = _document(sites, plan.whole, plan.left, tuned_record, how)
    digest = _write(out, draft, adapter, document, sites, record, weights, replace)
    written = max((one.rank for one in sites), default=0)
    return Extraction(out, digest, written, sites, tuple(m.site.name for m in plan.whole), left, notes, overrides)


def _require_form(rank: int | None, energy: float | None, exact: bool, dtype: str | None) -> None:
    have = [word for word, value in (("--rank", rank), ("--energy", energy), ("--dtype", dtype)) if value is not None]
    if exact and have:
        what = "whole modules have no rank, and keep their dtype"
        raise HubkitError("HK-USAGE", what, want="--exact alone", have=have, status=USAGE)
    if not exact and rank is None and energy is None:
        want = "--rank K, --energy E or --exact"
        raise HubkitError("HK-USAGE", "it is not said how much of the difference is wanted", want=want, status=USAGE)


def _planned(found: Between, record: BaseRecord, other: BaseRecord, exact: bool, partial: bool) -> _Plan:
    low, whole, left = [], [], [f"{name}: at no module that an adapter acts at" for name in found.others]
    left += [f"{line} tokens of the vocabulary" for line in found.grown]
    ours, theirs = record.fingerprint.config, other.fingerprint.config
    keys = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    left += [
        f"config.json, {key}: {ours.get(key)}, {theirs.get(key)}"
        for key in sorted(keys - {"vocab_size", "tie_word_embeddings"})
    ]
    for moved in found.sites:
        linear, name = moved.site.kind == "linear", moved.site.name
        if moved.site.tied and moved.other.tied:
            left.append(f"{name}.bias: of a head whose weight is its table's")
        elif exact:
            whole.append(moved)
        elif linear:
            low += [moved] if moved.weight else []
            left += [f"{name}.bias: beside a low-rank change there is none of a bias"] if moved.bias else []
        elif partial:
            left.append(f"{name}: {'a norm' if moved.site.kind == 'norm' else 'an embedding'}")
        else:
            whole.append(moved)
    return _Plan(tuple(low), tuple(whole), tuple(left))


def _require_change(plan: _Plan, found: Between, base: str, tuned: str) -> None:
    if plan.low or plan.whole:
        return
    what, have = "nothing that changed can be in an adapter of this form", plan.left[:20]
    if found.nothing and not plan.left:
        what, have = "the two checkpoints have the same weights: there is nothing to extract", ("no tensor differs",)
    raise HubkitError("HK-EXTRACT-NOOP", what, where=f"{base}, then {tuned}", have=have, fix="another checkpoint")


def _too_much(left: tuple[str, ...], exact: bool) -> HubkitError:
    fix = "--partial leaves them out, and says so in the manifest"
    return HubkitError(
        "HK-EXTRACT",
        "more changed than the adapter can hold: with it the base would not be the tuned checkpoint",
        have=left[:20] + ((f"and {len(left) - 20} more",) if len(left) > 20 else ()),
        fix=fix if exact else f"--exact, where these are biases; {fix}",
    )


def _notes(record: BaseRecord, other: BaseRecord) -> tuple[str, ...]:
    """What differs beside the weights, and is nothing that an adapter of weights carries."""
    one, two = record.fingerprint, other.fingerprint
    pairs = (("tokenizer", one.tokenizer, two.tokenizer), ("chat template", one.template, two.template))
    return tuple(f"the tuned checkpoint has another {what}" for what, a, b in pairs if b is not None and a != b)


def _factors(
    name: str, plan: _Plan, base: Base, tuned: Base, how: ExtractOptions, dtype: Any
) -> tuple[tuple[ExtractedSite, ...], Adapter]:
    """What was found at each linear layer, and the adapter made of it."""
    from hubkit.methods.composed import extracted
    from hubkit.tensors.weights.extracting import Pair, extract_sites

    made: list[ExtractedSite] = []
    factors = {}
    for one in extract_sites((Pair(m.site, m.other, m.rounded) for m in plan.low), how):
        made.append(one.found)
        if one.found.rank:
            factors[one.found.site] = (one.left.to(dtype or one.left.dtype), one.right.to(dtype or one.right.dtype))
    if not factors and not plan.whole:
        what = "the two checkpoints differ by rounding alone: there is nothing to extract"
        have = f"{len(made)} weights differ, none by more than their dtype rounds"
        raise HubkitError("HK-EXTRACT-NOOP", what, where=base.source, have=have, fix="--exact keeps that, too")
    whole = {m.site.name: {role: read() for role, read in _held(m).items()} for m in plan.whole}
    adapter = extracted(name, factors, whole, _tied(base, tuned), base)
    adapter.require_finite(tuned.source)
    return tuple(made), adapter


def _held(moved: Moved) -> Mapping[str, Any]:
    """role -> reads what the tuned module holds, as it stores it."""
    read, bias = moved.other.read, moved.other.bias_tensor
    assert read is not None, "a base of files reads them"
    tensor, number = moved.other.tensor, moved.other.number
    held = {"weight": lambda: read(tensor) if number is None else read(tensor, number)}
    return held if bias is None else {**held, "bias": lambda: read(bias)}


def _tied(base: Base, tuned: Base) -> Any:
    """Whether a head that the base ties still follows its table."""
    tied = {site.name for site in base.sites.values() if site.tied}
    return "keep" if tied and all(tuned.sites[name].tied for name in tied) else "break"


def _whole(name: str, plan: _Plan, base: Base, tuned: Base, shards: Shards) -> tuple[Adapter, Source]:
    """The adapter that holds every changed module, its parts empty, and what writes its tensors: byte ranges."""
    import dataclasses

    import torch

    from hubkit.methods.composed import extracted
    from hubkit.tensors.files.dtypes import torch_dtype
    from hubkit.tensors.files.shards import write_file
    from hubkit.tensors.parts.tied import TiedChange
    from hubkit.tensors.parts.values import require_finite
    from hubkit.tensors.weights.extracting import copied_module

    places = {m.site.name: copied_module(m.other, shards) for m in plan.whole}
    whole = {
        site: {role: torch.empty(t.shape, dtype=torch_dtype(t.dtype), device="meta") for role, t in roles.items()}
        for site, roles in places.items()
    }
    adapter = extracted(name, {}, whole, _tied(base, tuned), base)
    for m in plan.whole:
        require_finite(((f"{m.site.name}.{role}", read()) for role, read in _held(m).items()), tuned.source)
    tensors = []
    for (site, role), key in adapter.keys().items():
        part = adapter.parts[site]
        copied = places[part.site if isinstance(part, TiedChange) else site][role]
        tensors.append(dataclasses.replace(copied, name=key))
    return adapter, lambda path: write_file(path, sorted(tensors, key=lambda one: one.name))


def _document(
    sites: tuple[ExtractedSite, ...],
    whole: tuple[Moved, ...],
    left: tuple[str, ...],
    tuned: BaseRecord,
    how: ExtractOptions,
) -> dict[str, Any]:
    """The extraction as the manifest tells it; energies to six digits, which every machine agrees on."""
    one = tuned.fingerprint
    source = {"source": one.source and shareable(one.source), "revision": one.revision, "weights": one.weights}
    said: dict[str, Any] = {"tuned": {key: value for key, value in source.items() if value is not None}}
    if sites:
        kept = [site for site in sites if site.rank]
        least = min(kept, key=lambda site: site.energy, default=None)
        said |= {"form": "low-rank", "rank": max(site.rank for site in sites), "modules": len(kept)}
        said |= {"seed": how.seed, "not_low_rank": sum(site.more for site in sites)}
        if least is not None:
            said |= {"least_energy": round(least.energy, 6), "least_energy_site": least.site}
    wanted = {"rank_wanted": how.rank, "energy_wanted": how.energy}
    said |= {key: value for key, value in wanted.items() if value is not None}
    said |= {"whole": len(whole)} if whole else {}
    return said | ({"left_out": list(left)} if left else {})


def _write(
    out: Path,
    draft: Manifest,
    adapter: Adapter,
    document: Mapping[str, Any],
    sites: tuple[ExtractedSite, ...],
    record: BaseRecord,
    weights: Source | None,
    replace: bool,
) -> str:
    import dataclasses

    from hubkit.artifact.card import card_file
    from hubkit.methods.composed import plugin_of
    from hubkit.methods.config import config_document
    from hubkit.methods.foreign import own_files

    manifest = dataclasses.replace(
        draft,
        method=adapter.method.name,
        plugin=plugin_of(adapter),
        config=config_document(adapter.config),
        extraction=document,
    ).shareable()
    assert manifest.base is not None
    adapter.source, adapter.revision = manifest.base.source, manifest.base.revision
    files: dict[str, Source] = {WEIGHTS_NAME: weights} if weights is not None else {**own_files(adapter)}
    if sites:
        rows = [{**dataclasses.asdict(one), **_rounded(one)} for one in sites]
        files[SITES_NAME] = canonical({"sites": rows})
    files[TENSORS_NAME] = tensors_bytes(record.tensors)
    files[CARD_NAME] = card_file(manifest, files)
    return write(out, manifest, files, replace=replace).digest


def _rounded(site: ExtractedSite) -> dict[str, float]:
    """Figures to six digits."""
    return {name: float(f"{getattr(site, name):.6g}") for name in ("energy", "floor", "change")}
