"""What a merge must have written, and the proof that it did, from the written files alone.

`read_back` ends every merge: files are read again, headers first, and held against the digests taken while they were
written and against those of the base; the base is not read twice. `replay` is for later: it makes every tensor again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hubkit.artifact.identity.counted import TensorDigest
from hubkit.artifact.identity.digest import read_again
from hubkit.artifact.identity.header import TensorInfo
from hubkit.errors import HubkitError
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.coded import QUANTIZATION
from hubkit.tensors.files.dtypes import DTYPE_NAMES, torch_dtype
from hubkit.tensors.files.shards import Shards, open_shards
from hubkit.tensors.fourbit.nf4 import quantize
from hubkit.tensors.weights.decoding import DecodedShards
from hubkit.tensors.weights.merging import MergedFiles, MergePlan, matrices
from hubkit.tensors.weights.packing import packed_config, stored_tensors, to_pack

FAULTS = 20
"""Tensors that a refusal names."""
AGAIN = "merge again; look at disk and memory if it happens again"


@dataclass(frozen=True)
class Expected:
    """One tensor that a merge writes.

    Args:
        dtype, shape: as it is stored.
        values: makes it.
        addends: the sums of the magnitudes of what is added up in it: what its roundings are relative to.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]
    addends: Callable[[], Tensor]


def expected(plan: MergePlan, shards: Shards, dtype: torch.dtype | None) -> dict[str, Expected]:
    """Every tensor of the merged checkpoint by its name; nothing is read before its `values` are asked for.

    Args:
        as `write_merged`.
    """

    def kept(tensor: str) -> Expected:
        info = shards.headers[tensor]
        stored = torch_dtype(info.dtype)
        to = dtype if dtype is not None and stored.is_floating_point else stored
        return Expected(to, info.shape, lambda: shards.read(tensor).to(to), lambda: shards.read(tensor).double().abs())

    found = {tensor: kept(tensor) for tensor in shards.headers}
    for tensor, some in matrices(plan).items():
        made = {number: partial(plan.weight, site, dtype) for number, site in some.items()}
        sums = {number: partial(_addends, plan, site) for number, site in some.items()}
        values, addends = partial(_with, found[tensor].values, made), partial(_with, found[tensor].addends, sums)
        found[tensor] = replace(found[tensor], values=values, addends=addends)
    for site in (site for site in plan.sites if site.number is None):
        name = f"{site.name}.weight" if site.tied else site.tensor
        own = kept(site.tensor)
        values, addends = partial(plan.weight, site, dtype), partial(_addends, plan, site)
        found[name] = Expected(own.dtype, plan.shape(site, own.shape), values, addends)
        if site.bias_tensor is not None and not plan.keeps_bias(site):
            own = kept(site.bias_tensor)
            found[site.bias_tensor] = replace(own, values=partial(_bias, plan, site, dtype))
    head = plan.tied_head
    if head is not None and f"{head.name}.weight" not in found:
        found[f"{head.name}.weight"] = kept(head.tensor)
    return found


def _with(whole: Callable[[], Tensor], parts: Mapping[int, Callable[[], Tensor]]) -> Tensor:
    """A tensor with some of its rows made anew."""
    made = whole()
    for number, part in parts.items():
        made[number] = part()
    return made


def _bias(plan: MergePlan, site: Site, dtype: torch.dtype | None) -> Tensor:
    bias = plan.bias(site, dtype)
    assert bias is not None
    return bias


def _addends(plan: MergePlan, site: Site) -> Tensor:
    delta, total = plan.delta(site), site.weight().double().abs()
    if delta.left is not None and delta.right is not None:
        total = total + delta.left.double().abs() @ delta.right.double().abs()
    total = total if delta.dense is None else total + delta.dense.double().abs()
    return total.t() if site.transposed else total


def require_layout(out: Path, plan: MergePlan, shards: Shards, dtype: torch.dtype | None) -> Shards:
    """The checkpoint in folder `out`, which has every tensor that it must have, in its shape and dtype, and no other.

    Raises:
        HubkitError: ``HK-MERGE-DIFFERS`` with each that is missing, superfluous or another; what opening files raises.
    """
    merged = open_shards(out)
    want = {name: (DTYPE_NAMES[one.dtype], one.shape) for name, one in expected(plan, shards, dtype).items()}
    have = {name: (info.dtype, info.shape) for name, info in merged.headers.items()}
    faults = [
        *(f"{name}: missing" for name in want if name not in have),
        *(f"{name}: not of this merge" for name in have if name not in want),
        *(f"{n}: {have[n][0]} {have[n][1]}, not {w[0]} {w[1]}" for n, w in want.items() if have.get(n, w) != w),
    ]
    if faults:
        raise differs(out, faults)
    return merged


def read_back(
    out: Path,
    plan: MergePlan,
    shards: Shards,
    dtype: torch.dtype | None,
    written: MergedFiles,
    base: Iterable[TensorDigest],
) -> frozenset[str]:
    """Proves what `write_merged` left in folder `out`; returns the tensors that are the base's own.

    All tensors are there, and no other. Those that were computed are, to the byte, what the arithmetic gave: the files
    have the digests that were taken on the way into them. All others have the digests that the base's tensors have.

    Args:
        plan, shards, dtype: as given to `write_merged`.
        written: what it returned.
        base: the digests of the base's tensors.

    Raises:
        HubkitError: ``HK-MERGE-DIFFERS``; what reading raises.
    """
    merged = require_layout(out, plan, shards, dtype)
    computed = {*written.changed, *(shards.weights if isinstance(shards, DecodedShards) else ())}
    kept = [name for name in merged.headers if name in shards.headers and name not in computed]
    known = {one.name: (one.dtype, one.sha256) for one in base}
    left_out = [name for name in kept if name not in known]  # buffers, and second copies of a tied table
    if left_out:
        known |= _digests(read_again(shards.path, _by_file(shards, left_out), whole=False))
    again = read_again(out, {**dict.fromkeys(written.files, ()), **_by_file(merged, kept)})
    faults = [f"{file}: {again[file][0]}, not {want}" for file, want in written.files.items() if again[file][0] != want]
    own = _digests(again)
    faults += [f"{name}: not the base's" for name in kept if own[name] != known[name]]
    if faults:
        raise differs(out, faults)
    return frozenset(kept)


def _by_file(shards: Shards, names: list[str]) -> dict[str, list[TensorInfo]]:
    found: dict[str, list[TensorInfo]] = {}
    for name in names:
        found.setdefault(shards.file_of[name], []).append(shards.headers[name])
    return found


def _digests(found: Mapping[str, tuple[str, list[TensorDigest]]]) -> dict[str, tuple[str, str]]:
    return {one.name: (one.dtype, one.sha256) for _, tensors in found.values() for one in tensors}


def require_files(out: Path, files: Mapping[str, str]) -> None:
    """Refuses files that have another digest than was taken on the way into them: ``HK-MERGE-DIFFERS``."""
    found = read_again(out, dict.fromkeys(files, ()))
    faults = [f"{file}: {found[file][0]}, not {want}" for file, want in files.items() if found[file][0] != want]
    if faults:
        raise differs(out, faults)


def replay(
    out: Path, plan: MergePlan, shards: Shards, dtype: torch.dtype | None, *, exact: bool = True, packed: bool = False
) -> dict[str, int]:
    """Makes every tensor of the merge again, one at a time, and holds it against the checkpoint in folder `out`.

    Args:
        plan, shards, dtype: as they were given to `write_merged`.
        exact: demand the same bits: on the processor and torch that merged. Elsewhere sums round otherwise; see
            `_beyond` for what is let pass then.
        packed: the result was packed into 4 bits by `write_packed`.

    Returns:
        the tensors that differ within that, by name: how many of their values.

    Raises:
        HubkitError: ``HK-MERGE-DIFFERS`` with every tensor that is another; what reading raises.
    """
    merged, wanted = open_shards(out), expected(plan, shards, dtype)
    config, sites = json.loads(plan.config(shards.config, dtype)), to_pack(shards) if packed else {}
    off: dict[str, int] = {}
    faults: list[str] = []
    seen: set[str] = set()
    for name, one in wanted.items():
        made = {name: one.values()}
        if name in sites:
            weight = quantize(made[name].t() if sites[name].transposed else made[name])
            made = stored_tensors(name, weight)
            config = config if QUANTIZATION in config else packed_config(config, weight, shards)
        for part, want in made.items():
            seen.add(part)
            have = merged.read(part) if part in merged.headers else None
            count = _different(have, want)
            if isinstance(count, str):
                faults.append(f"{part}: {count}")
            elif count and have is not None:
                beyond = (
                    count if exact or not have.is_floating_point() or packed else _beyond(have, want, one.addends())
                )
                off |= {} if beyond else {part: count}
                faults += [f"{part}: {beyond} of {have.numel()} values differ"] if beyond else []
    faults += [f"{name}: not of this merge" for name in merged.headers if name not in seen]
    if merged.config != config:
        faults.append("config.json: not the base's with what the merge changes in it")
    if faults:
        raise differs(out, faults, "whoever changed it knows why; hubkit merge makes it anew")
    return off


def _different(have: Tensor | None, want: Tensor) -> int | str:
    """How many values differ in their bits; or what is wrong with the tensor as such."""
    if have is None:
        return "missing"
    if (have.dtype, have.shape) != (want.dtype, want.shape):
        return f"{DTYPE_NAMES[have.dtype]} {tuple(have.shape)}, not {DTYPE_NAMES[want.dtype]} {tuple(want.shape)}"
    bits, wanted = (one.contiguous().flatten().view(torch.uint8) for one in (have, want))
    return 0 if bits.equal(wanted) else int((bits != wanted).view(-1, have.element_size()).any(-1).sum())


def _beyond(have: Tensor, want: Tensor, addends: Tensor) -> int:
    """How many values differ by more than another order of summing can make them.

    That is one unit in the last place of their dtype, and one of fp32 at the sum of the magnitudes of what is added up.
    """
    have, want, addends = have.flatten(), want.flatten(), addends.flatten()
    most = _unit(torch.maximum(have.double().abs(), want.double().abs()), have.dtype)
    most[: len(addends)] += _unit(addends, torch.float32)  # rows that a vocabulary grows by are sums of nothing
    return int(((have.double() - want.double()).abs() <= most).logical_not().sum())


def _unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of `dtype` at each of `values`, not negative, float64."""
    facts = torch.finfo(dtype)
    exponent = torch.frexp(values.clamp(min=facts.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(values, facts.eps), exponent - 1)


def differs(
    out: Path, faults: list[str], fix: str = "merge again; look at disk and memory if it happens again"
) -> HubkitError:
    """The refusal of a checkpoint that is not what the merge gives."""
    rest = [f"and {len(faults) - FAULTS} more"] if len(faults) > FAULTS else []
    what = "the merged checkpoint is not what base and adapters give"
    return HubkitError("HK-MERGE-DIFFERS", what, where=str(out), have=[*faults[:FAULTS], *rest], fix=fix)
