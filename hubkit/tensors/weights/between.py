"""Two checkpoints side by side: which sites and tensors differ, known from digests alone where both have them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hubkit.artifact.identity.counted import TensorDigest
from hubkit.errors import HubkitError
from hubkit.tensors.base.base import Base
from hubkit.tensors.base.site import Site, natural
from hubkit.tensors.weights.workers import in_order, workers_for

_SHOWN = 24
"""Places that a refusal names one by one."""


@dataclass(frozen=True)
class Moved:
    """A site whose values differ.

    Args:
        site: in the first checkpoint.
        other: in the second.
        weight: the weight differs.
        bias: the bias differs.
        rounded: the dtype that the second weight's values need, as safetensors name it.
    """

    site: Site
    other: Site
    weight: bool
    bias: bool
    rounded: str


@dataclass(frozen=True)
class Between:
    """How two checkpoints differ.

    Args:
        sites: where values differ, in the first one's order; a tied head that stays tied is its table's.
        others: tensors at no site whose values differ.
        grown: tables and heads of another number of tokens, in words.
        alone: what one of the two has alone, or in another shape, in words.
    """

    sites: tuple[Moved, ...]
    others: tuple[str, ...]
    grown: tuple[str, ...]
    alone: tuple[str, ...]

    @property
    def nothing(self) -> bool:
        """Whether the two are the same."""
        return not (self.sites or self.others or self.grown or self.alone)


def between(base: Base, tensors: Iterable[TensorDigest], other: Base, other_tensors: Iterable[TensorDigest]) -> Between:
    """How `other` differs from `base`; no weight is read.

    Sites are found by their names, which leave out what old files leave out; all other tensors by the files'.

    Args:
        base: by its headers, or as ``tensors.json`` lists it.
        tensors: its tensors with their digests.
        other: by its headers.
        other_tensors: its tensors with their digests.
    """
    mine, theirs = {t.name: t for t in tensors}, {t.name: t for t in other_tensors}
    ours = {name: site for name, site in base.sites.items() if site.tensor}
    found = {name: site for name, site in other.sites.items() if site.tensor}
    moved, grown, faults = list[Moved](), list[str](), list[str]()
    held, other_held = set[str](), set[str]()
    for name in ours.keys() | found.keys():
        one, two = ours.get(name), found.get(name)
        for site, used in ((one, held), (two, other_held)):
            used |= set() if site is None else {site.tensor, *([site.bias_tensor] if site.bias_tensor else ())}
        if one is None or two is None or one.shape != two.shape:
            (grown if _grew(base, one, two) else faults).append(_said(name, one, two))
            continue
        weight = _differs(mine.get(one.tensor), theirs.get(two.tensor), one.packed or two.packed)
        bias = _bias_differs(one, two, mine, theirs)
        if bias is None:
            faults.append(f"{name}.bias: in one alone")
        elif (weight or bias) and not (one.tied and two.tied and not bias):
            digest = theirs.get(two.tensor)
            moved.append(Moved(one, two, weight and not (one.tied and two.tied), bias, digest.dtype if digest else ""))
    rest, other_rest = _rest(mine, held, base), _rest(theirs, other_held, other)
    packed = any(site.packed for site in (*ours.values(), *found.values()))
    others = []
    for name in sorted((rest.keys() | other_rest.keys()) if not packed else rest.keys() & other_rest.keys()):
        first, second = rest.get(name), other_rest.get(name)
        if first is None or second is None or first.shape != second.shape:
            faults.append(f"{name}: {_shape(first)}, {_shape(second)}")
        elif _differs(first, second, False):
            others.append(name)
    order = {name: number for number, name in enumerate(ours)}
    sites = tuple(sorted(moved, key=lambda one: order[one.site.name]))
    return Between(sites, tuple(others), tuple(sorted(grown)), tuple(_by_layer(faults)))


@dataclass(frozen=True)
class SiteChange:
    """A module whose values differ between two bases.

    Args:
        site: its name.
        change: the norm of the difference over that of the first one's values; None where it is not known: one of the
            two is not at hand, or stores codes.
        adapted: the adapter acts there.
    """

    site: str
    change: float | None
    adapted: bool


def relative_changes(sites: Iterable[Moved]) -> list[float | None]:
    """‖W' - W‖ / ‖W‖ of each, biases among them; None where a side stores codes. A few are in memory at a time."""
    chosen = list(sites)
    largest = max((one.site.shape[0] * one.site.shape[1] for one in chosen), default=1)
    return list(in_order(_relative, chosen, workers_for(4 * 4 * largest)))


def _relative(moved: Moved) -> float | None:
    if moved.site.coded or moved.other.coded:
        return None
    pairs = [(moved.site.weight(), moved.other.weight())] if moved.weight else []
    one, two = moved.site.bias(), moved.other.bias()
    pairs += [(one, two)] if moved.bias and one is not None and two is not None else []
    difference = sum(float((b.float() - a.float()).square().sum(dtype=torch.float64)) for a, b in pairs)
    total = sum(float(a.float().square().sum(dtype=torch.float64)) for a, _ in pairs)
    return float((difference / total) ** 0.5) if total > 0 else float("inf")


def refuse_other_shapes(found: Between, base: str, other: str, what: str, fix: str) -> None:
    """Refuses two checkpoints that do not have the same modules in the same shapes: ``HK-SHAPE``.

    Args:
        base: name of the first.
        other: name of the second.
        what: a sentence on what cannot be.
    """
    if found.alone:
        more = len(found.alone) - _SHOWN
        have = [*found.alone[:_SHOWN], *([f"and {more} more"] if more > 0 else ())]
        raise HubkitError("HK-SHAPE", what, where=f"{base}, then {other}", have=have, fix=fix)


def _differs(one: TensorDigest | None, two: TensorDigest | None, packed: bool) -> bool:
    """Whether values differ; what no digest can tell counts as different."""
    if packed or one is None or two is None or not one.sha256 or not two.sha256:
        return True
    return (one.dtype, one.shape, one.sha256) != (two.dtype, two.shape, two.sha256)


def _bias_differs(
    one: Site, two: Site, mine: Mapping[str, TensorDigest], theirs: Mapping[str, TensorDigest]
) -> bool | None:
    """None where only one of the two has a bias."""
    if one.bias_tensor is None or two.bias_tensor is None:
        return False if one.bias_tensor == two.bias_tensor else None
    return _differs(mine.get(one.bias_tensor), theirs.get(two.bias_tensor), False)


def _grew(base: Base, one: Site | None, two: Site | None) -> bool:
    """Whether two sites differ in their number of tokens alone."""
    if one is None or two is None:
        return False
    if one.kind == "embedding":
        return one.shape[0] == two.shape[0]
    return base.arch.is_head(one.name) and one.shape[1] == two.shape[1]


def _said(name: str, one: Site | None, two: Site | None) -> str:
    return f"{name}: {_shape(one)}, {_shape(two)}"


def _shape(of: Site | TensorDigest | None) -> str:
    return "nothing" if of is None else "x".join(map(str, of.shape))


def _rest(tensors: Mapping[str, TensorDigest], held: set[str], base: Base) -> dict[str, TensorDigest]:
    """The tensors at no site, by names that leave out the prefix which old files leave out."""
    prefix = base.arch.prefix
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name not in held}


def _by_layer(faults: Iterable[str]) -> list[str]:
    """Faults in the order of their names; those of a layer that one of the two lacks as one line."""
    listed, layers = list[str](), Counter[str]()
    for fault in faults:
        layer = re.match(r"(.*?\.\d+)\.", fault)
        side = 1 if ": nothing, " in fault else 2 if fault.endswith(", nothing") else 0
        if layer and side:
            layers[f"{layer[1]}: in the {'second' if side == 1 else 'first'} alone"] += 1
        else:
            listed.append(fault)
    listed += [f"{line} ({count} modules)" for line, count in layers.items()]
    return sorted(listed, key=lambda line: natural(line.partition(":")[0]))
