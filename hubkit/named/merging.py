"""A merge between its names and its folder: weights to merge into, the plan, and files, written and proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import quantized_for
from hubkit.errors import USAGE, HubkitError
from hubkit.named.terms import Term, adapters

if TYPE_CHECKING:
    import torch

    from hubkit.artifact.identity.digest import TensorDigest
    from hubkit.tensors.files.shards import Shards
    from hubkit.tensors.parts.mix import Mix
    from hubkit.tensors.weights.merging import MergePlan

INTO = ("trained", "original", "4bit")
"""Weights that an adapter can be merged into: see `hubkit.verbs.merge`."""


@dataclass(frozen=True)
class Prepared:
    """A merge before the first byte.

    Args:
        shards: the weights to merge into.
        plan: what changes in them.
        codec: how the base was quantized for an adapter that was trained so, or is in its files; None where it is not.
        compute_dtype: what it was decoded to.
        decoded: weights that are codes in the files and none in `shards`: name -> dtype now.
        shift: how far `shards` lie from the weights trained beside; None where they are these.
    """

    shards: Shards
    plan: MergePlan
    codec: str | None
    compute_dtype: str | None
    shift: float | None
    decoded: Mapping[str, str]


def require_into(into: str) -> None:
    """Refuses a word that is not of `INTO`: ``HK-OPTIONS``."""
    if into not in INTO:
        what = "unknown weights to merge into"
        raise HubkitError("HK-OPTIONS", what, want=", ".join(INTO), have=into, status=USAGE)


def prepared(
    base: Path, members: list[Term], mix: Mix, into: str, dtype: torch.dtype | None = None, *, measured: bool = True
) -> Prepared:
    """Plans merging `mix` of `members` into the base in folder `base`.

    Args:
        dtype: of all floating tensors of the result; weights that are codes and change, or are to be cast, are decoded.
        measured: measure `Prepared.shift`, which reads the base.

    Raises:
        HubkitError: what reading base and adapters raises; what `plan_merge` raises.
    """
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.base.base import Base
    from hubkit.tensors.files.shards import open_shards
    from hubkit.tensors.weights.decoding import DecodedShards, decoded, distance, without_codes
    from hubkit.tensors.weights.merging import plan_merge

    codec, compute_dtype = quantized_for(term.folder for term in adapters(members))
    shards, shift = open_shards(base), None
    view = decoded(shards, codec, compute_dtype, packed=into != "original")
    if isinstance(view, DecodedShards):
        codec = view.codec
        shift = distance(shards, view) if into == "original" and measured else None
        shards = shards if into == "original" else view
    sites = Base.from_headers(shards.headers, shards.config, str(shards.path), shards.read)
    read = {term.name: read_adapter(term.folder, sites, name=term.name, mapped=True) for term in adapters(members)}
    plan = plan_merge(sites, mix, read)
    shards = without_codes(shards, sites, plan.sites, dtype)
    return Prepared(shards, plan, codec, compute_dtype, shift, _uncoded(open_shards(base), shards))


def _uncoded(stored: Shards, shards: Shards) -> Mapping[str, str]:
    """The weights that are codes in the files `stored` and none in `shards`: name -> dtype now."""
    from hubkit.tensors.base.formats import is_coded
    from hubkit.tensors.files.dtypes import torch_dtype

    found: dict[str, str] = {}
    for name, info in shards.headers.items():
        before = stored.headers.get(name)
        if before is None or (before.dtype != info.dtype and is_coded(torch_dtype(before.dtype))):
            found[name] = str(torch_dtype(info.dtype)).removeprefix("torch.")
    return found


@dataclass(frozen=True)
class Made:
    """Weight files that were written and read back; see `hubkit.verbs.merge.Merged`."""

    files: Mapping[str, str]
    changed: int
    tensors: int
    kept: int
    shift: float | None
    lost: float | None = None


def write(
    ready: Prepared,
    stage: Path,
    dtype: torch.dtype | None,
    key: str,
    limit: int | None,
    base: tuple[TensorDigest, ...],
) -> Made | None:
    """Writes and proves the weights in folder `stage`, packed again without a `key`; None where none would change."""
    import shutil

    from hubkit.tensors.weights.merging import write_merged
    from hubkit.tensors.weights.packing import write_packed
    from hubkit.tensors.weights.proof import read_back, require_files

    place = stage if key else stage / ".merged"
    place.mkdir(exist_ok=True)
    written = write_merged(ready.plan, ready.shards, place, dtype, limit=limit, key=key)
    if not written.changed:
        return None
    kept = read_back(place, ready.plan, ready.shards, dtype, written, base)
    changed, tensors = len(written.changed), len(ready.shards.headers) + (ready.plan.tied_head is not None)
    if key:
        return Made(written.files, changed, tensors, len(kept), ready.shift)
    done = write_packed(place, stage, ready.shards)
    shutil.rmtree(place)
    require_files(stage, done.files)
    return Made(done.files, changed, done.tensors, len(kept & done.own), done.shift, done.lost)
