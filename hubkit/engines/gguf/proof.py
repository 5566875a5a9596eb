"""That a GGUF holds the weights of a base, row by row, and in which order.

llama.cpp pairs the rows of a head that are rotated together side by side, transformers puts one half of a head after
the other, so converters permute q and k of some architectures ::

    transformers   a0 a1 a2 b0 b1 b2        GGUF   a0 b0 a1 b1 a2 b2        (rows of one head)

What acts on these rows has to be permuted alike, and loads without a word when it is not. Which of the two it is, is
found in the file: each row is compared with the base's own, in both orders. A GGUF that fits in neither is of another
base. Gemma's norms are stored with 1 added; that is found the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubkit.engines.gguf.base import HEAD, GgufBase
from hubkit.engines.gguf.header import FIX
from hubkit.engines.gguf.names import Names, Place
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from torch import Tensor

    from hubkit.tensors.base.base import Base
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.files.shards import Shards

TILE = 1 << 22
"""Values that are compared at a time."""
PERMUTED = ("llama",)
"""Architectures whose converter permutes q and k: tried first, where both orders fit (rows that are alike)."""
DERIVED = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight")
"""Tensors that converters make of the configuration."""
SMALL = 0.1
"""Part of the mean length of a row that counts as its length at least: rounding is relative to neighbours, too."""


@dataclass(frozen=True)
class Fit:
    """How rows of a GGUF are rows of a site's weight.

    Args:
        place: which rows.
        order: which of the site's rows, counted from the first of `place`, each row of the GGUF is; None: in order.
        shift: what is added to each value.
    """

    place: Place
    order: Tensor | None = None
    shift: float = 0.0

    def taken(self, values: Tensor) -> Tensor:
        """The rows of `values` (rows of the site, ...) that stand at the place, in the GGUF's order."""
        first, last = self.place.source
        rows = values[first:last]
        return rows if self.order is None else rows[self.order]


class Proof:
    """Compares one base with one GGUF.

    Args:
        gguf: the GGUF.
        base: the base, with weights.
    """

    def __init__(self, gguf: GgufBase, base: Base) -> None:
        self.gguf, self.base = gguf, base
        self.names = Names(gguf, lambda name: height(base.sites[name]) if name in base.sites else None)

    def weight(self, site: Site) -> list[Fit]:
        """How the weight of a site lies in the GGUF; empty where that has no place for it.

        Raises:
            HubkitError: ``HK-GGUF`` where it is there and is not the base's.
        """
        places = self.names.places(site.name)
        if not places:
            return []
        stored = site.weight()
        stored = stored.t() if site.kind == "embedding" else stored
        return [self._fit(place, stored, site.name) for place in places]

    def bias(self, site: Site) -> list[Fit]:
        """As `weight`, of a site's bias."""
        places = self.names.places(site.name, "bias") if site.has_bias else []
        stored = site.bias() if places else None
        return [] if stored is None else [self._fit(place, stored[:, None], f"{site.name}, bias") for place in places]

    def everything(self, shards: Shards) -> None:
        """Proves that the GGUF holds the base, every tensor of it, and nothing else.

        Args:
            shards: the base's files: what is no site, such as a router of experts, is there alone.

        Raises:
            HubkitError: ``HK-GGUF``, for the first that differs.
        """
        found: list[Fit] = []
        for site in self.base.sites.values():
            if site.kind in ("linear", "embedding", "norm") and not site.tied:
                found += [*self.weight(site), *self.bias(site)]
            elif site.tied and HEAD in self.gguf.tensors:
                found += self.weight(site)
        for tensor, info in shards.headers.items():
            module, _, end = tensor.rpartition(".")
            if module not in self.base.sites and end in ("weight", "bias") and len(info.shape) < 3:
                places = Names(self.gguf, lambda _, rows=info.shape[0]: rows).places(module, end)  # type: ignore[misc]
                stored = shards.read(tensor).view(info.shape[0], -1) if places else None
                found += [] if stored is None else [self._fit(place, stored, tensor) for place in places]
        known = {fit.place.tensor for fit in found}
        strange = [name for name in self.gguf.tensors if name not in known and not DERIVED.fullmatch(name)]
        if strange:
            raise _other(self.gguf, f"{len(strange)} tensors that the base does not have, first {strange[0]}")

    def _fit(self, place: Place, stored: Tensor, name: str) -> Fit:
        matrices, rows, columns = self.gguf.shape(place.tensor)
        inside = place.rows[1] <= rows and place.source[1] <= stored.shape[0] and (place.expert or 0) < matrices
        if not inside or columns != stored.shape[1]:
            want = f"{name}: {tuple(stored.shape)}"
            have = f"{place.tensor}: {self.gguf.tensors[place.tensor].shape}"
            raise _other(self.gguf, have, want)
        worst = []
        for fit in self._candidates(place, stored):
            error = self._error(fit, stored)
            if error <= tolerance(self.gguf, place.tensor):
                return fit
            worst.append(error)
        have = f"{place.tensor}: a row is {min(worst):.2g} of its length away"
        raise _other(self.gguf, have, f"{name}: {tolerance(self.gguf, place.tensor):.2g} at most, its rounding")

    def _candidates(self, place: Place, stored: Tensor) -> Iterator[Fit]:
        """The orders and shifts to try, the likeliest first."""
        turned = Fit(place, interleaved(place.source[1] - place.source[0], place.heads)) if place.heads else None
        if turned is not None and self.gguf.architecture in PERMUTED:
            yield turned
        yield Fit(place)
        if turned is not None and self.gguf.architecture not in PERMUTED:
            yield turned
        if stored.shape[1] == 1:
            yield Fit(place, shift=1.0)

    def _error(self, fit: Fit, stored: Tensor) -> float:
        """The largest distance of a row from the base's, as a part of the row's length."""
        import torch

        first, last = fit.place.rows
        rows = fit.taken(stored)
        step = max(1, TILE // stored.shape[1])
        distances, lengths = [], []
        for at in range(0, last - first, step):
            want = rows[at : at + step].float() + fit.shift
            have = self.gguf.rows(fit.place.tensor, fit.place.expert, first + at, first + at + want.shape[0])
            distances.append((have - want).norm(dim=1))
            lengths.append(want.norm(dim=1))
        length = torch.cat(lengths)
        least = SMALL * float(length.square().mean().sqrt())
        errors = torch.cat(distances) / length.clamp_min(max(least, 1e-30))
        return float(torch.nan_to_num(errors, nan=float("inf")).max())


def height(site: Site) -> int:
    """Rows of a site's weight as files store it."""
    return site.shape[1] if site.kind == "embedding" else site.shape[0]


def interleaved(rows: int, heads: int) -> Tensor | None:
    """Which row of transformers each row of llama.cpp's order is; None where they cannot be halved so."""
    import torch

    if rows % (2 * heads):
        return None
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(rows)


def tolerance(gguf: GgufBase, tensor: str) -> float:
    """What rounding to a tensor's type may do to a row, as a part of its length.

    A code of b bits is a step of 2^-b of a block's range at best: four times that is above what every quantization of
    llama.cpp does, and far below what another order does, which is 1.4 for rows that are strangers.
    """
    kind = gguf.type_of(tensor)
    exact = {"F32": 2**-20, "F16": 2**-10, "BF16": 2**-7}
    return exact.get(kind) or min(0.7, 4 * 2 ** -gguf.bits(tensor))


def _other(gguf: GgufBase, have: str, want: str = "the weights of the base, row by row") -> HubkitError:
    what = "the GGUF was not made of this base"
    return HubkitError("HK-GGUF", what, where=str(gguf.path), want=want, have=have, fix=FIX)
