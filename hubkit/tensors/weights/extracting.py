"""The difference of two checkpoints of one layout as low-rank factors, site by site.

    Δ = V - W          V the tuned weight, as its dtype rounded it; W the base's

Rounding V adds noise to Δ: of variance ulp²/12 where changes are longer than an ulp (a number then lies anywhere
between its neighbours), and where they are shorter, and W often stays, of the changes' own. Its singular values reach
up to

    floor = max_i √(Σ_j σ²_ij) + max_j √(Σ_i σ²_ij)        σ²_ij = min(ulp²_ij / 12, mean Δ²)

which for one σ is σ(√m + √n), the edge of Marchenko and Pastur 1967; for any others Bandeira and van Handel 2016,
https://arxiv.org/abs/1408.6185. That of one matrix differs from it by about its n^(-2/3) (Tracy and Widom). What lies
below it says nothing of Δ and is not kept: energy is that above it. A weight that is the base's, rounded, has no Δ at
all. The factors are found by the seeded randomized range finder of `truncate.py`, which is exact for small matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.formats import ORIGINAL, refuse_codes
from hubkit.tensors.base.site import Site
from hubkit.tensors.files.dtypes import torch_dtype
from hubkit.tensors.files.shards import Shards, Written
from hubkit.tensors.seed import generator_for
from hubkit.tensors.weights.truncate import Truncated, truncate_dense
from hubkit.tensors.weights.workers import in_order, workers_for

FIRST = 32
"""Directions that are looked for first where only an energy is given; then twice as many, as long as it takes."""
ARITHMETIC = 4.0
"""What fp32 itself adds while weights are merged or trained, in units of the last rounding."""


@dataclass(frozen=True)
class ExtractOptions:
    """How much of each difference is kept.

    Args:
        rank: the largest rank; None for no limit.
        energy: part of the energy above the rounding floor that every site keeps; None for all of it.
        seed: of the random columns that find the range of a large difference.
    """

    rank: int | None = None
    energy: float | None = None
    seed: int = 0


def extract_options(rank: int | None, energy: float | None, seed: int = 0) -> ExtractOptions:
    """Checked options.

    Raises:
        HubkitError: ``HK-RANK`` below 1, ``HK-ENERGY`` outside (0, 1].
    """
    if rank is not None and rank < 1:
        raise HubkitError("HK-RANK", "the rank is too small", want="at least 1", have=str(rank), status=USAGE)
    if energy is not None and not 0 < energy <= 1:
        what = "this is no part of the energy"
        raise HubkitError("HK-ENERGY", what, want="0 < energy <= 1", have=str(energy), status=USAGE)
    return ExtractOptions(rank, energy, seed)


def require_numbers(*sides: Base) -> None:
    """Refuses checkpoints whose weights are codes, or packed: no difference of weights (``HK-BASE-FORMAT``)."""
    for base in sides:
        refuse_codes((site.name for site in base.sites.values() if site.coded), base.source)
        packed = [site.name for site in base.sites.values() if site.packed]
        if packed:
            what = "the checkpoint is stored in 4 bits: the difference would be that of rounding to its levels"
            have = f"{len(packed)} packed weights, first {packed[0]}"
            raise HubkitError("HK-BASE-FORMAT", what, where=base.source, have=have, fix=ORIGINAL)


@dataclass(frozen=True)
class ExtractedSite:
    """One module whose weight's difference became factors.

    Args:
        site: its name.
        rank: of the factors; 0 where the difference is rounding alone, and nothing is kept.
        energy: part of the energy above the rounding floor that they keep.
        more: whether directions above the floor are left out: it is not low-rank within the budget.
        floor: the largest singular value that rounding alone gives.
        change: ‖Δ‖ / ‖W‖.
    """

    site: str
    rank: int
    energy: float
    more: bool
    floor: float
    change: float


@dataclass(frozen=True)
class Extracted:
    """What was found at one site, and its factors: left (out, rank), right (rank, in)."""

    found: ExtractedSite
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Pair:
    """A site of the base, the same of the tuned checkpoint, and the dtype that its values need (`F32`, `BF16`, ...)."""

    base: Site
    tuned: Site
    rounded: str


def extract_sites(pairs: Iterable[Pair], how: ExtractOptions) -> Iterator[Extracted]:
    """The factors of each pair, in their order; one site per worker is in memory at a time.

    Raises:
        HubkitError: ``HK-NAN`` for a weight of either side that is not finite.
    """
    chosen = list(pairs)
    largest = max((one.base.shape[0] * one.base.shape[1] for one in chosen), default=1)
    return in_order(lambda pair: extract_site(pair, how), chosen, workers_for(4 * 8 * largest))


def extract_site(pair: Pair, how: ExtractOptions) -> Extracted:
    """The factors of one pair; see `extract_sites`."""
    coarse = pair.rounded in ("BF16", "F16")
    wide = torch.float32 if coarse else torch.float64
    weight, tuned = pair.base.weight().to(wide), pair.tuned.weight().to(wide)
    for site, values in ((pair.base, weight), (pair.tuned, tuned)):
        if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
            raise HubkitError("HK-NAN", "a weight is not finite", where=f"{site.tensor}: {_side(site is pair.base)}")
    size, delta = float(torch.linalg.vector_norm(weight)), tuned - weight
    floor, noise = rounding_floor(delta, tuned if coarse else torch.maximum(tuned.abs(), weight.abs()), pair.rounded)
    if torch.equal(weight.to(torch_dtype(pair.rounded)).to(wide), tuned):
        floor = 1.001 * float(torch.linalg.vector_norm(delta))  # no singular value lies above that
    del weight, tuned
    found, kept = _found(delta, floor, noise, how, pair.base.name)
    above = _above(found, floor)
    rest = _rest(found, delta.shape, floor, noise)
    total = float(found.energies[:above].sum()) + rest
    energy = float(found.energies[:kept].sum()) / total if total > 0 else 1.0
    change = found.total**0.5 / size if size > 0 else float("inf")
    left, right = found.left[:, :kept].float().contiguous(), found.right[:kept].float().contiguous()
    more = kept < above or rest > 0
    return Extracted(ExtractedSite(pair.base.name, kept, min(1.0, energy), more, floor, change), left, right)


def rounding_floor(delta: Tensor, rounded: Tensor, dtype: str) -> tuple[float, float]:
    """The largest singular value that rounding gives a difference, and the energy of all of it.

    Args:
        delta: (out, in).
        rounded: of the same shape: what was rounded.
        dtype: to which, as safetensors name it.
    """
    facts = torch.finfo(torch_dtype(dtype))
    exponents = torch.frexp(rounded)[1] - 1
    unit = torch.ldexp(torch.full_like(delta, facts.eps), exponents).clamp_min_(facts.smallest_normal * facts.eps)
    variance = unit.square_().div_(12).clamp_max_(float(delta.square().mean()))
    rows, columns = variance.sum(1), variance.sum(0)
    edge = float(rows.max().sqrt() + columns.max().sqrt()) * (1 + min(delta.shape) ** (-2 / 3))
    return edge * (1.0 if dtype in ("BF16", "F16") else ARITHMETIC), float(rows.sum())


def _side(base: bool) -> str:
    return "the base" if base else "the tuned checkpoint"


def _found(delta: Tensor, floor: float, noise: float, how: ExtractOptions, site: str) -> tuple[Truncated, int]:
    """As many of the first directions as are needed to choose, and how many of them are kept."""
    short = min(delta.shape)
    asked = min(short, FIRST if how.rank is None else how.rank + 1)
    while True:
        sketch = generator_for(how.seed, site, "", "sketch")
        found = truncate_dense(delta, asked, sketch)
        above = _above(found, floor)
        most = above if how.rank is None else min(above, how.rank)
        rest = _rest(found, delta.shape, floor, noise)
        kept, enough = most, rest == 0
        if how.energy is not None:
            sums = found.energies[:above].cumsum(0)
            wanted = how.energy * (1 - 1e-9) * ((float(sums[-1]) if above else 0.0) + rest)
            reached = int((sums < wanted).sum()) + 1
            kept, enough = min(most, reached), enough or reached <= above
        if enough or asked >= short or (how.rank is not None and asked > how.rank):
            return found, kept
        asked = min(short, 2 * asked)


def _above(found: Truncated, floor: float) -> int:
    """How many of the singular values lie above the floor."""
    return int((found.energies.sqrt() > floor).sum())


def _rest(found: Truncated, shape: torch.Size, floor: float, noise: float) -> float:
    """The energy above the floor that is not among the directions found: all that is not rounding's share."""
    count = found.energies.numel()
    if count == min(shape) or (count and float(found.energies[-1]) <= floor**2):
        return 0.0
    share = (shape[0] - count) * (shape[1] - count) / (shape[0] * shape[1])
    return max(0.0, found.total - float(found.energies.sum()) - noise * share)


def copied_module(site: Site, shards: Shards) -> dict[str, Written]:
    """``weight`` and perhaps ``bias`` of a module of files, as they hold them, to be written elsewhere."""
    number = site.number
    weight = shards.copied(site.tensor, part=None if number is None else slice(number, number + 1))
    held = {"weight": weight if number is None else replace(weight, shape=weight.shape[1:])}
    return held if site.bias_tensor is None else {**held, "bias": shards.copied(site.bias_tensor)}
