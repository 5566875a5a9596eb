"""What targets name: ``all-linear``, names of modules, expressions, within layers; each must name something."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from hubkit.errors import HubkitError, nearest
from hubkit.tensors.base.arch import Arch
from hubkit.tensors.base.expressions import expression
from hubkit.tensors.base.layers import Layers, outside, within
from hubkit.tensors.base.site import Site


def named_sites(
    sites: Mapping[str, Site],
    targets: str | Sequence[str],
    kinds: Collection[str],
    layers: Layers | None,
    *,
    arch: Arch,
    source: str,
    others: Collection[str],
) -> list[Site]:
    """The sites that `targets` name, in the order of `sites`; see `Base.match`.

    Args:
        sites: all of a base, by name.
        kinds: of sites that the method can serve.
        layers: only in these; None: in all.
        source: of the base, for messages.
        others: paths of its modules that are no sites, for messages.

    Raises:
        HubkitError: ``HK-TARGET``, ``HK-CONFIG``.
    """
    inside = sites if layers is None else within(sites, layers, source)
    if targets == "all-linear":
        return [s for s in inside.values() if s.kind == "linear" and not arch.is_head(s.name)]
    if targets == "all-norm" and "norm" in kinds:
        return [s for s in inside.values() if s.kind == "norm"]
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]
    pool = [name for name, site in sites.items() if site.kind != "block" or "block" in kinds]
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if target == "all-norm":
            found = {name for name, site in sites.items() if site.kind == "norm"}
        elif isinstance(targets, str):
            found = {name for name in pool if _pattern(target).fullmatch(name)}
            found = {n for n in found if "norm" in kinds or sites[n].kind != "norm"} or found
        else:
            found = {name for name in pool if name == target or name.endswith("." + target)}
        if not found:
            raise _unmatched(target, sites, arch, source, others)
        if not found & inside.keys():
            raise outside(target, found, layers, source)
        found &= inside.keys()
        foreign = sorted(name for name in found if sites[name].kind not in kinds)
        if foreign:
            raise HubkitError(
                "HK-TARGET",
                f"the method cannot act at {target!r}",
                where=source,
                want=f"sites of kind {' or '.join(kinds)}",
                have=[f"{name}: {sites[name].kind}" for name in foreign],
            )
        chosen |= found
    return [site for site in sites.values() if site.name in chosen]


def _unmatched(target: str, sites: Mapping[str, Site], arch: Arch, source: str, others: Collection[str]) -> HubkitError:
    """The refusal of a target that matches nothing, with what it could have meant."""
    counts: dict[str, int] = {}
    for site in sites.values():
        if not arch.is_head(site.name) and site.kind == "linear":
            last = site.name.rpartition(".")[2]
            counts[last] = counts.get(last, 0) + 1
    families = " ".join(f"{name} ({count})" for name, count in counts.items())
    names = {site.rpartition(".")[2] for site in sites} | set(sites)
    near = nearest(target.rpartition(".")[2], names) or nearest(target, names)
    known = target in others or any(o.endswith("." + target) for o in others)
    why = "names a module that holds no weight of its own" if known else "matches nothing in the base"
    return HubkitError(
        "HK-TARGET",
        f"the target {target!r} {why}",
        where=source,
        want=f"one of: {families}" if families else "a base with linear layers",
        have=target,
        fix=f"near: {', '.join(near)}" if near else "all-linear takes every linear layer but the head",
    )


def _pattern(text: str) -> re.Pattern[str]:
    """A target expression; bounded, because it can come from a stranger's file."""
    try:
        return expression(text)
    except re.error as e:
        raise HubkitError(
            "HK-TARGET",
            "the target is not a usable regular expression",
            where=text[:80],
            have=str(e),
            fix="list the module names instead: q_proj,v_proj",
        ) from e
