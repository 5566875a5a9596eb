"""What targets name: ``all-linear``, names of modules, expressions, within layers; each must name something."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from hubkit.artifact.forms import short_targets
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
    others: Mapping[str, str],
) -> list[Site]:
    """The sites that `targets` name, in the order of `sites`; see `Base.match`.

    Args:
        sites: all of a base, by name.
        kinds: of sites that the method can serve.
        layers: only in these; None: in all.
        source: of the base, for messages.
        others: paths of its modules that are no sites -> what to do who wants one; for messages.

    Raises:
        HubkitError: ``HK-TARGET``, ``HK-CONFIG``.
    """
    inside = sites if layers is None else within(sites, layers, source)
    if targets == "all-linear":
        linear = (s for s in inside.values() if s.kind == "linear" and s.number is None)
        return _of_text([s for s in linear if not arch.is_head(s.name)], arch)
    if targets == "all-norm" and "norm" in kinds:
        return [s for s in inside.values() if s.kind == "norm"]
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        targets = [targets]
    pool = [name for name, site in sites.items() if site.kind != "block" or "block" in kinds]
    alone = [name for name in pool if sites[name].number is None]
    groups = {name: sites[name].group for name in pool if sites[name].number is not None}
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        # what chose no expert of a tensor before there were sites for them chooses none
        names, end = pool if "experts" in target else alone, f".{target}"
        if target == "all-norm":
            found = {name for name, site in sites.items() if site.kind == "norm"}
        elif isinstance(targets, str):
            found = {name for name in names if _pattern(target).fullmatch(name)}
            found = {n for n in found if "norm" in kinds or sites[n].kind != "norm"} or found
        else:
            found = {name for name in names if name == target or name.endswith(end)}
            found |= {name for name, group in groups.items() if names is pool and f".{group}".endswith(end)}
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


def short_names(chosen: Collection[str], sites: Mapping[str, Site]) -> list[str]:
    """The shortest list of names that choose exactly the sites `chosen`: see `hubkit.artifact.forms.short_targets`.

    Experts that the files hold in one tensor are named by their group where all of it is chosen.

    Args:
        sites: all that names could mean.

    Raises:
        HubkitError: ``HK-TARGET`` where no such list exists.
    """
    kinds: dict[str, set[str]] = {}
    groups: dict[str, set[str]] = {}
    for name, site in sites.items():
        if site.number is not None:
            kinds.setdefault(".".join(site.group.split(".")[-2:]), set()).add(name)
            groups.setdefault(site.group, set()).add(name)
    rest = {name for name in chosen if name in sites and sites[name].number is not None}
    found = short_targets(set(chosen) - rest, [name for name, site in sites.items() if site.number is None])
    for named in (kinds, groups):
        whole = [name for name, members in named.items() if members <= rest]
        found += whole
        rest = rest.difference(*(named[name] for name in whole))
    return sorted([*found, *rest])


def _of_text(sites: list[Site], arch: Arch) -> list[Site]:
    """Those of a language model among the sites of a model of several parts: rows of text train nothing else."""
    return [site for site in sites if not arch.tower(site.name)] or sites


def _unmatched(
    target: str, sites: Mapping[str, Site], arch: Arch, source: str, others: Mapping[str, str]
) -> HubkitError:
    """The refusal of a target that matches nothing, with what it could have meant."""
    counts: dict[str, int] = {}
    for site in sites.values():
        if not arch.is_head(site.name) and site.kind == "linear":
            last = ".".join(site.group.split(".")[-2:]) or site.name.rpartition(".")[2]
            counts[last] = counts.get(last, 0) + 1
    families = " ".join(f"{name} ({count})" for name, count in counts.items())
    names = {site.rpartition(".")[2] for site in sites if sites[site].number is None} | {*counts, *sites} - {target}
    near = nearest(target, counts) if "." in target else []
    near = near or nearest(target.rpartition(".")[2], names) or nearest(target, names)
    known = next((other for other in others if other == target or other.endswith("." + target)), None)
    why = "matches nothing in the base" if known is None else "names a module that holds no weight of its own"
    mend = others.get(known or "", "")
    return HubkitError(
        "HK-TARGET",
        f"the target {target!r} {why}",
        where=source,
        want=f"one of: {families}" if families else "a base with linear layers",
        have=target,
        fix=mend or f"near: {', '.join(near)}" if mend or near else "all-linear takes every linear layer but the head",
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
