"""How two adapters differ in what they add to a base: norms and cosines of their deltas, a site at a time, in fp64.

Two low-rank deltas are never multiplied out: with the columns of both in one orthonormal basis, and the rows of both in
another, each is a small matrix, and the difference of the small ones has the norm that the difference of the large ones
has. Everything else is summed a block of rows at a time. A change of a bias counts as further entries of its site.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hubkit.tensors.base.delta import Delta, tile_rows
from hubkit.tensors.base.site import Site
from hubkit.tensors.parts.adapter import Adapter
from hubkit.tensors.parts.whole import WholeModule


@dataclass(frozen=True)
class SiteDifference:
    """Two adapters at one site.

    Args:
        site: its name.
        norms: Frobenius norms of what each adds; 0 where one does not act.
        difference: norm of second less first.
        cosine: of the two; None where one is zero.
        values: what was compared are the tensors themselves, not a change of a weight.
    """

    site: str
    norms: tuple[float, float]
    difference: float
    cosine: float | None
    values: bool = False


@dataclass
class _Sums:
    """Squares and products of entries, added up."""

    first: float = 0.0
    second: float = 0.0
    both: float = 0.0
    apart: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        a, b = a.double(), b.double()
        self.first += float((a * a).sum())
        self.second += float((b * b).sum())
        self.both += float((a * b).sum())
        self.apart += float((b - a).square().sum())

    def at(self, site: str, values: bool) -> SiteDifference:
        size = math.sqrt(self.first) * math.sqrt(self.second)
        cosine = max(-1.0, min(1.0, self.both / size)) if size > 0 else None
        norms = math.sqrt(self.first), math.sqrt(self.second)
        return SiteDifference(site, norms, math.sqrt(self.apart), cosine, values)


def site_differences(first: Adapter, second: Adapter) -> Iterator[SiteDifference]:
    """Every site at which one of two adapters acts, in the base's order; one is in memory at a time.

    Both are at the sites of one base. What is no change of a weight, tokens in front or a bottleneck, is compared by
    its tensors; the caller sees to it that both are of one method then. So is a module that both hold whole, where the
    base's own values are not at hand.

    Raises:
        HubkitError: ``HK-BASE-NEEDED`` for a method that needs the base's values; ``HK-SHAPE``.
        hubkit.methods.api.NotMergeable: from a method, with its reason.
    """
    base = first.base
    order = [*base.sites, *base.virtual, *base.rows]
    acting = {**first.parts, **second.parts}
    mergeable = not (first.method.unmergeable or second.method.unmergeable)
    with torch.no_grad():
        for name in (name for name in order if name in acting):
            sums = _Sums()
            if mergeable and name in base.rows:
                continue  # rows of a table: they are in its delta
            values = not (mergeable and name in base.sites) or _held_whole(first, second, name)
            if values:
                _tensors(sums, first, second, name)
            else:
                site = base.sites[name]
                _deltas(sums, site, first.delta(site), second.delta(site))
            yield sums.at(name, values)


def _held_whole(first: Adapter, second: Adapter, name: str) -> bool:
    """Whether both hold a module of a base whose values are not at hand."""
    parts = first.parts.get(name), second.parts.get(name)
    return first.base.sites[name].read is None and all(isinstance(part, WholeModule) for part in parts)


def _deltas(sums: _Sums, site: Site, first: Delta | None, second: Delta | None) -> None:
    a, b = first or Delta(), second or Delta()
    if a.dense is None and b.dense is None:
        _factors(sums, a, b)
    else:
        for start in range(0, site.shape[0], rows := tile_rows(site.shape[1])):
            part = slice(start, start + rows)
            sums.add(_rows(a, part, site), _rows(b, part, site))
    if a.bias is not None or b.bias is not None:
        zero = torch.zeros(site.shape[0])
        sums.add(zero if a.bias is None else a.bias, zero if b.bias is None else b.bias)


def _factors(sums: _Sums, a: Delta, b: Delta) -> None:
    """Two low-rank deltas, in the smallest spaces that hold both."""
    known = [(one.left, one.right) for one in (a, b) if one.left is not None and one.right is not None]
    if not known:
        return
    left = torch.linalg.qr(torch.cat([one.double() for one, _ in known], 1), mode="r").R
    right = torch.linalg.qr(torch.cat([one.double().t() for _, one in known], 1), mode="r").R
    small, at = [], 0
    for one in (a, b):
        rank = 0 if one.left is None else one.left.shape[1]
        small.append(left[:, at : at + rank] @ right[:, at : at + rank].t())
        at += rank
    same = len(known) == 2 and all(torch.equal(x, y) for x, y in zip(*known, strict=True))
    sums.add(small[0], small[0] if same else small[1])


def _rows(delta: Delta, part: slice, site: Site) -> Tensor:
    rows = torch.zeros(min(part.stop, site.shape[0]) - part.start, site.shape[1], dtype=torch.float64)
    if delta.dense is not None:
        rows += delta.dense[part]
    if delta.left is not None and delta.right is not None:
        rows += delta.left[part].double() @ delta.right.double()
    return rows


def _tensors(sums: _Sums, first: Adapter, second: Adapter, name: str) -> None:
    """The tensors of a part themselves."""
    sides = [dict(one.parts[name].values()) if name in one.parts else {} for one in (first, second)]
    for role in sorted({*sides[0], *sides[1]}):
        a, b = (side.get(role) for side in sides)
        some = a if a is not None else b
        assert some is not None  # one of the two has it
        a, b = (torch.zeros_like(some) if one is None else one for one in (a, b))
        if a.shape == b.shape:
            sums.add(a, b)
        else:  # of other sizes: nothing of the two is alike
            sums.add(a, torch.zeros_like(a))
            sums.add(torch.zeros_like(b), b)
