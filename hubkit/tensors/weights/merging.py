"""Merging a mix into the base's weights: one rule for a live model and for files, streamed shard by shard.

Nothing is decided after the first byte: which tensors change, which tied pair is broken and every refusal come from
`plan_merge`; `write_merged` then only streams.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from hubkit.artifact.identity.base_files import INDEX, WEIGHTS
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.delta import Delta, apply_bias, apply_weight
from hubkit.tensors.base.formats import refuse_codes
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.dtypes import torch_dtype
from hubkit.tensors.files.shards import Shards, Written, computed, write_file
from hubkit.tensors.parts import mix as mixes
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.mix import Mix
from hubkit.tensors.parts.part import LowRank
from hubkit.tensors.parts.tied import keeps_tie
from hubkit.tensors.parts.vocabulary import has_rows
from hubkit.tensors.parts.vocabulary_plan import VocabularyPlan, plan_vocabulary

TIES = "tie_word_embeddings"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
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

    def weight(self, site: Site, dtype: torch.dtype | None = None) -> Tensor:
        """The merged weight of one site, as it is stored ((in, out) where transposed), in `dtype` or the stored one.

        Raises:
            HubkitError: ``HK-NAN`` when a value leaves the range of the dtype.
        """
        stored = site.weight().t() if site.transposed else site.weight()
        merged = apply_weight(stored, self.delta(site), transposed=site.transposed, dtype=dtype)
        merged = merged if self.vocabulary is None else self.vocabulary.longer(site, merged)
        return _in_range(merged.view(-1) if site.kind == "norm" else merged, site.name)

    def shape(self, site: Site, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The merged weight's shape: `stored`, unless the vocabulary grows."""
        if self.vocabulary is None or self.vocabulary.at(site) is None:
            return stored
        return self.vocabulary.size, *stored[1:]

    def bias(self, site: Site, dtype: torch.dtype | None = None) -> Tensor | None:
        """The merged bias of one site, or None where there is none.

        Raises:
            HubkitError: as `weight`.
        """
        stored = site.bias()
        return None if stored is None else _in_range(apply_bias(stored, self.delta(site), dtype=dtype), site.name)


def _in_range(values: Tensor, where: str) -> Tensor:
    """`values`, all finite: the sum tells at once, unless it is itself beyond fp32."""
    if not torch.isfinite(values.sum(dtype=torch.float32)) and not torch.isfinite(values).all():
        raise HubkitError(
            "HK-NAN",
            f"the result leaves the range of {str(values.dtype).removeprefix('torch.')}",
            where=where,
            fix="--dtype float32",
        )
    return values


def plan_merge(base: Base, mix: Mix, adapters: Mapping[str, Adapter]) -> MergePlan:
    """Plans merging `mix` into `base`.

    Raises:
        HubkitError: ``HK-NOT-MERGEABLE`` with each member's reason, or for a base in 4 bits; ``HK-BASE-FORMAT`` for one
            that stores codes;
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
    refuse_codes([site.name for site in sites if site.coded], base.source)
    packed = [site.name for site in sites if site.packed and site.module is None]
    if packed:
        raise HubkitError(
            "HK-NOT-MERGEABLE",
            "the base is stored in 4 bits: rounding to its levels would undo most of the change",
            where=base.source,
            have=f"{len(packed)} of {len(sites)} weights are packed, first {packed[0]}",
            fix="merge into the 16-bit base that it was made from, with --allow-base-mismatch",
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


def write_merged(plan: MergePlan, shards: Shards, out: Path, dtype: torch.dtype | None = None) -> MergedFiles:
    """Streams the merged weights, config and index into folder `out`: the same shards under the same names.

    Args:
        dtype: cast every floating tensor to it; None keeps each tensor's own dtype.
    """
    changed: set[str] = set()
    changes = {name: _watched(new, shards, changed) for name, new in _changes(plan, shards, dtype).items()}
    files: dict[str, str] = {}
    placed: dict[str, list[Written]] = {name: [] for name in shards.files()}
    for tensor in shards.headers:
        change = changes.pop(tensor, None)
        placed[shards.file_of[tensor]].append(change or _kept(shards, tensor, dtype))
    last = shards.files()[-1]
    placed[last] += changes.values()
    for name, tensors in placed.items():
        files[name] = write_file(out / name, tensors)
    if shards.files() != [WEIGHTS]:
        _write_index(out / INDEX, placed)
    size = None if plan.vocabulary is None else plan.vocabulary.size
    (out / "config.json").write_bytes(_config(shards.config, plan.tied_head is not None, dtype, size))
    changed |= {t for t, info in shards.headers.items() if dtype and torch_dtype(info.dtype) not in (dtype, *_INTEGERS)}
    return MergedFiles(files, tuple(t.name for tensors in placed.values() for t in tensors if t.name in changed))


def _watched(new: Written, shards: Shards, changed: set[str]) -> Written:
    """`new`, noting in `changed` whether any value differs from the base's."""
    info = shards.headers.get(new.name)

    def blocks() -> Iterator[bytes | memoryview]:
        same = info is not None and (info.dtype, info.shape) == (new.dtype, new.shape)
        before = shards.copied(new.name).values() if same else ()
        for block, old in zip_longest(new.values(), before):
            if block is not None:
                yield block
            if block is None or old is None or bytes(block) != bytes(old):
                changed.add(new.name)

    return Written(new.name, new.dtype, new.shape, blocks)


def _changes(plan: MergePlan, shards: Shards, dtype: torch.dtype | None) -> dict[str, Written]:
    """Tensor name -> how its merged values are made; includes a head that is no longer tied."""
    changes: dict[str, Written] = {}
    for site in plan.sites:
        info = shards.headers[site.tensor]
        name = f"{site.name}.weight" if site.tied else site.tensor
        wanted = dtype or torch_dtype(info.dtype)
        changes[name] = computed(name, wanted, plan.shape(site, info.shape), partial(plan.weight, site, dtype))
        if all(isinstance(a.parts.get(site.name), LowRank | None) for a in plan.adapters.values()):
            continue
        if site.bias_tensor is not None:
            info = shards.headers[site.bias_tensor]
            wanted = dtype or torch_dtype(info.dtype)
            changes[info.name] = computed(info.name, wanted, info.shape, partial(_bias, plan, site, wanted))
        elif plan.delta(site).bias is not None:
            raise HubkitError(
                "HK-NOT-MERGEABLE",
                f"the mix adds a bias at {site.name} and the base has none there",
                where=site.tensor,
                fix=BESIDE,
            )
    _untie(plan, shards, changes, dtype)
    return changes


def _bias(plan: MergePlan, site: Site, dtype: torch.dtype) -> Tensor:
    bias = plan.bias(site, dtype)
    assert bias is not None
    return bias


def _untie(plan: MergePlan, shards: Shards, changes: dict[str, Written], dtype: torch.dtype | None) -> None:
    """The half of a tied pair that does not change is written out beside the half that does."""
    head = plan.tied_head
    if head is None or f"{head.name}.weight" in changes:
        return
    kept = _kept(shards, head.tensor, dtype)
    changes[f"{head.name}.weight"] = Written(f"{head.name}.weight", kept.dtype, kept.shape, kept.values)


def _kept(shards: Shards, tensor: str, dtype: torch.dtype | None) -> Written:
    info = shards.headers[tensor]
    stored = torch_dtype(info.dtype)
    if dtype is None or dtype == stored or not stored.is_floating_point:
        return shards.copied(tensor)
    return computed(tensor, dtype, info.shape, lambda: _in_range(shards.read(tensor).to(dtype), tensor))


def _write_index(path: Path, placed: Mapping[str, list[Written]]) -> None:
    total = sum(tensor.size for tensors in placed.values() for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in placed.items() for tensor in tensors}
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")


def _config(config: Mapping[str, object], breaks_tie: bool, dtype: torch.dtype | None, size: int | None) -> bytes:
    document = dict(config)
    if size is not None:
        text = document.get("text_config")
        if "vocab_size" not in document and isinstance(text, Mapping):
            document["text_config"] = {**text, "vocab_size": size}
        else:
            document["vocab_size"] = size
    if breaks_tie:
        document[TIES] = False
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in document else "dtype"
        document[key] = str(dtype).removeprefix("torch.")
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
