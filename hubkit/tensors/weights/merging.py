"""Merging a mix into the base's weights: one rule for a live model and for files, streamed shard by shard.

Nothing is decided after the first byte: which tensors change, which tied pair is broken and every refusal come from
`plan_merge`; `write_merged` then only streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hubkit.artifact.identity.base_files import INDEX, WEIGHTS
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import TILE_ELEMENTS, Delta, Tiles, apply_bias, apply_weight
from hubkit.tensors.base.formats import refuse_codes
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.dtypes import DTYPE_NAMES, torch_dtype
from hubkit.tensors.files.pipeline import Block, Pipeline
from hubkit.tensors.files.shards import Shards, Written, computed, split, tensor_bytes, unwritten, write_file
from hubkit.tensors.parts import mix as mixes
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix
from hubkit.tensors.parts.part import LowRank
from hubkit.tensors.parts.tied import keeps_tie
from hubkit.tensors.parts.values import in_range
from hubkit.tensors.parts.vocabulary import has_rows
from hubkit.tensors.parts.vocabulary_plan import VocabularyPlan, plan_vocabulary
from hubkit.tensors.weights.beside import merged_config, write_index
from hubkit.tensors.weights.finished import Finished

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
CPU = torch.device("cpu")
BESIDE = "keep the adapter beside its base: hubkit generate, hubkit deploy"


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Args:
        mix: the tree.
        adapters: its members by name.
        sites: the sites whose weights change.
        tied_head: the output head, when it shared its weight with an embedding and one of the two changes: the result
            has two weights. None when no tie is broken.
        vocabulary: what the mix does to rows of single tokens; None when nothing.
    """

    mix: Mix
    adapters: Mapping[str, Adapter]
    sites: tuple[Site, ...]
    tied_head: Site | None
    vocabulary: VocabularyPlan | None = None

    def delta(self, site: Site) -> Delta:
        """What the mix adds at one of `sites`."""
        change = mixes.delta(self.mix, site, lambda name, at: self.adapters[name].delta(at))
        return Delta() if change is None else change

    def adds_bias(self, site: Site) -> bool:
        """Whether the mix changes the bias of one of `sites`; reads no value where its methods compute on ``meta``."""
        meta = torch.device("meta")
        try:
            change = mixes.delta(self.mix, site.hollow(), lambda name, at: self.adapters[name].delta(at, device=meta))
        except (RuntimeError, NotImplementedError):  # a method that looks at values
            change = self.delta(site)
        return change is not None and change.bias is not None

    def weight(self, site: Site, dtype: torch.dtype | None = None) -> Tensor:
        """The merged weight of one site, as it is stored ((in, out) where transposed), in `dtype` or the stored one.

        Raises:
            HubkitError: ``HK-NAN`` when a value leaves the range of the dtype.
        """
        stored = site.weight().t() if site.transposed else site.weight()
        merged = apply_weight(stored, self.delta(site), transposed=site.transposed, dtype=dtype)
        added = None if self.vocabulary is None else self.vocabulary.added(site, merged.shape[0])
        merged = merged if added is None else torch.cat([merged, added.to(merged.dtype)])
        return in_range(merged.view(-1) if site.kind == "norm" else merged, site.name)

    def shape(self, site: Site, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The merged weight's shape: `stored`, unless the vocabulary grows."""
        if self.vocabulary is None or self.vocabulary.at(site) is None:
            return stored
        return self.vocabulary.size, *stored[1:]

    def config(self, config: Mapping[str, object], dtype: torch.dtype | None = None) -> bytes:
        """The bytes of the merged checkpoint's ``config.json``, of the base's `config`."""
        size = None if self.vocabulary is None else self.vocabulary.size
        return merged_config(config, self.tied_head is not None, dtype, size)

    def keeps_bias(self, site: Site) -> bool:
        """Whether no member can change the bias of `site`."""
        return all(isinstance(adapter.parts.get(site.name), LowRank | None) for adapter in self.adapters.values())

    def bias(self, site: Site, dtype: torch.dtype | None = None) -> Tensor | None:
        """The merged bias of one site, or None where there is none.

        Raises:
            HubkitError: as `weight`.
        """
        stored = site.bias()
        return None if stored is None else in_range(apply_bias(stored, self.delta(site), dtype=dtype), site.name)


def plan_merge(base: Base, mix: Mix, adapters: Mapping[str, Adapter]) -> MergePlan:
    """Plans merging `mix` into `base`.

    Raises:
        HubkitError: ``HK-NOT-MERGEABLE`` with each member's reason, or for a base in 4 bits; ``HK-BASE-FORMAT`` for one
            in memory that stores codes, and for files with codes that are not decoded here;
            ``HK-UNKNOWN-ADAPTER``, ``HK-SHAPE``; ``HK-VOCABULARY`` for members that add different tokens.
    """
    mixes.require_known(mix, adapters)
    used = {name: adapters[name] for name in mixes.names(mix)}
    reasons = [f"{name}: {reason}" for name, a in used.items() if (reason := a.method.unmergeable)]
    if reasons:
        raise HubkitError("HK-NOT-MERGEABLE", "the mix cannot become one weight", have=reasons, fix=BESIDE)
    vocabulary = plan_vocabulary(mix, used, base)
    sites = tuple(
        s for s in base.sites.values() if any(s.name in a.parts or has_rows(s, a.parts) for a in used.values())
    )
    refuse_codes([site.name for site in sites if site.coded and site.codes is None], base.source)
    packed = [site.name for site in sites if site.packed and site.module is None]
    if packed:
        raise HubkitError(
            "HK-NOT-MERGEABLE",
            "the base is stored in 4 bits, and nothing can be added to codes",
            where=base.source,
            have=f"{len(packed)} of {len(sites)} weights are packed, first {packed[0]}",
            fix="--into trained decodes them; or the 16-bit base that it was made from, with --allow-base-mismatch",
        )
    head = next((site for site in base.sites.values() if site.tied), None)
    if head is not None and all(keeps_tie(a.parts, base, head) for a in used.values()):
        sites = tuple(site for site in sites if site.name != head.name)
        return MergePlan(mix, used, sites, None, vocabulary)
    broken = head is not None and any(site.tensor == head.tensor for site in sites)
    return MergePlan(mix, used, sites, head if broken else None, vocabulary)


@dataclass(frozen=True)
class MergedFiles:
    """What `write_merged` wrote: file name -> sha256; and the tensors that are not the base's, bit for bit."""

    files: Mapping[str, str]
    changed: tuple[str, ...]


def write_merged(
    plan: MergePlan,
    shards: Shards,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    limit: int | None = None,
    key: str = "",
) -> MergedFiles:
    """Streams the merged weights, config and index into folder `out`.

    Args:
        dtype: cast every floating tensor to it; None keeps each tensor's own dtype.
        limit: bytes of the tensors of one file, see `in_files`; None for the base's own files under their names.
        key: of the merge, so that finished files in `out` are taken over; see `hubkit.tensors.weights.finished`.
    """
    changed: set[str] = set()
    placed = in_files(plan, shards, dtype, limit, changed)
    files: dict[str, str] = {}
    held = unwritten(shards.path / name for name in shards.files())
    with held, Finished(out, key) as finished, Pipeline() as pipeline:
        for name, tensors in placed.items():
            if (known := finished.found(name)) is not None:
                files[name] = known[0]
                changed.update(known[1])
                continue
            files[name] = write_file(out / name, tensors, pipeline)
            finished.add(name, files[name], {tensor.name for tensor in tensors} & changed)
    if [*placed] != [WEIGHTS]:
        write_index(out / INDEX, placed)
    (out / "config.json").write_bytes(plan.config(shards.config, dtype))
    changed |= {t for t, info in shards.headers.items() if dtype and torch_dtype(info.dtype) not in (dtype, *_INTEGERS)}
    return MergedFiles(files, tuple(t.name for tensors in placed.values() for t in tensors if t.name in changed))


def in_files(
    plan: MergePlan, shards: Shards, dtype: torch.dtype | None, limit: int | None, changed: set[str]
) -> dict[str, list[Written]]:
    """File name -> the tensors that the merge puts into it, in order: the base's own files, or those of `split`.

    Args:
        changed: writing the tensors notes here which are not the base's, bit for bit.
    """
    changes = _changes(plan, shards, dtype, changed)
    files = shards.files()
    placed: dict[str, list[Written]] = {name: [] for name in files}
    for tensor in shards.headers:
        change = changes.pop(tensor, None)
        placed[shards.file_of[tensor]].append(change or _kept(shards, tensor, dtype))
    placed[files[-1]] += changes.values()
    if limit is None:
        return placed
    return split([one for tensors in placed.values() for one in tensors], limit)


def _merged(
    plan: MergePlan, shards: Shards, site: Site, dtype: torch.dtype | None, changed: set[str], room: Tensor
) -> Written:
    """The merged weight of one site, from file to file in tiles of rows: bit for bit what `MergePlan.weight` makes.

    Args:
        site: where its tensor holds the matrices of several, what is made of this one alone.
        room: what tiles are summed in, one after the other.
    """
    info = shards.headers[site.tensor]
    name = f"{site.name}.weight" if site.tied else site.tensor
    stored = torch_dtype(info.dtype)
    wanted = dtype or stored
    rows, columns = site.shape[::-1] if site.transposed else site.shape
    before = (site.number or 0) * rows
    shape = plan.shape(site, info.shape)
    changed |= {name} if shape != info.shape else set()

    def blocks() -> Iterator[Block]:
        whole = None if shards.holds(site.tensor) else shards.read(site.tensor).view(-1, columns)
        delta = plan.delta(site)
        tiles = Tiles((rows, columns), stored, delta, device=CPU, transposed=site.transposed, room=room)

        def make(part: slice, old: Tensor, new: Tensor) -> None:
            sums = tiles.sum(part, old.view(stored).view(-1, columns))
            in_range(new.view(wanted).view(-1, columns).copy_(sums), site.name)
            if name not in changed and not (wanted == stored and torch.equal(old, new)):
                changed.add(name)

        for part in tiles.parts():
            count = (part.stop - part.start) * columns
            if whole is None:
                first, last = ((before + at) * columns * stored.itemsize for at in (part.start, part.stop))
                yield shards.range(site.tensor, first, last, count * wanted.itemsize, partial(make, part))
            else:
                made = torch.empty(count * wanted.itemsize, dtype=torch.uint8)
                rest = whole[before + part.start : before + part.stop]
                make(part, rest.reshape(-1).view(torch.uint8), made)
                yield tensor_bytes(made)
        if plan.vocabulary is not None:
            added = plan.vocabulary.added(site, rows)
            yield b"" if added is None else tensor_bytes(in_range(added.to(wanted), site.name))

    return Written(name, DTYPE_NAMES[wanted], shape, blocks)


def _changes(plan: MergePlan, shards: Shards, dtype: torch.dtype | None, changed: set[str]) -> dict[str, Written]:
    """Tensor name -> how its merged values are made; includes a head that is no longer tied."""
    changes: dict[str, Written] = {}
    room = torch.empty(TILE_ELEMENTS)
    for tensor, own in matrices(plan).items():
        pieces = {number: _merged(plan, shards, site, dtype, changed, room) for number, site in own.items()}
        changes[tensor] = _in_turn(shards, tensor, dtype, pieces)
    for site in (site for site in plan.sites if site.number is None):
        new = _merged(plan, shards, site, dtype, changed, room)
        changes[new.name] = new
        if plan.keeps_bias(site):
            continue
        if site.bias_tensor is not None:
            changes[site.bias_tensor] = _bias(plan, shards, site, dtype, changed)
        elif plan.adds_bias(site):
            raise HubkitError(
                "HK-NOT-MERGEABLE",
                f"the mix adds a bias at {site.name} and the base has none there",
                where=site.tensor,
                fix=BESIDE,
            )
    _untie(plan, shards, changes, dtype, changed)
    return changes


def matrices(plan: MergePlan) -> dict[str, dict[int, Site]]:
    """Tensor of the files that holds matrices of several sites -> number -> site whose own changes."""
    found: dict[str, dict[int, Site]] = {}
    for site in plan.sites:
        if site.number is not None:
            found.setdefault(site.tensor, {})[site.number] = site
    return found


def _in_turn(shards: Shards, tensor: str, dtype: torch.dtype | None, pieces: Mapping[int, Written]) -> Written:
    """A tensor that holds one matrix after the other, of which some change."""

    def blocks() -> Iterator[Block]:
        done = 0
        for number in sorted(pieces):
            yield from _kept(shards, tensor, dtype, slice(done, number)).blocks()
            yield from pieces[number].blocks()
            done = number + 1
        yield from _kept(shards, tensor, dtype, slice(done, shards.headers[tensor].shape[0])).blocks()

    return replace(_kept(shards, tensor, dtype), blocks=blocks)


def _bias(plan: MergePlan, shards: Shards, site: Site, dtype: torch.dtype | None, changed: set[str]) -> Written:
    assert site.bias_tensor is not None
    info = shards.headers[site.bias_tensor]

    def make() -> Tensor:
        old, new = site.bias(), plan.bias(site, dtype)
        assert old is not None
        assert new is not None
        if new.dtype != old.dtype or not torch.equal(_bits(old), _bits(new)):
            changed.add(info.name)
        return new

    return computed(info.name, dtype or torch_dtype(info.dtype), info.shape, make)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _untie(
    plan: MergePlan, shards: Shards, changes: dict[str, Written], dtype: torch.dtype | None, changed: set[str]
) -> None:
    """The half of a tied pair that does not change is written out beside the half that does."""
    head = plan.tied_head
    if head is not None and f"{head.name}.weight" not in changes:
        changes[f"{head.name}.weight"] = replace(_kept(shards, head.tensor, dtype), name=f"{head.name}.weight")
    changed.update(name for name in changes if name not in shards.headers)


def _kept(shards: Shards, tensor: str, dtype: torch.dtype | None, part: slice | None = None) -> Written:
    """A tensor that the mix leaves alone, or some of its rows, cast where another dtype is wanted."""
    info = shards.headers[tensor]
    stored = torch_dtype(info.dtype)
    if dtype is None or dtype == stored or not stored.is_floating_point:
        return shards.copied(tensor, part=part)
    if not shards.holds(tensor):
        return computed(tensor, dtype, info.shape, lambda: in_range(shards.read(tensor).to(dtype), tensor))

    def cast(before: Tensor, after: Tensor) -> None:
        in_range(after.view(dtype).copy_(before.view(stored)), tensor)

    return shards.copied(tensor, dtype, cast, part)
