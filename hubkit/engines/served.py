"""What a deployment serves beside its base: plain LoRAs under names that carry digests.

A lock is a mix, and what was locked is what runs: by default the whole mix is one served adapter, exactly concatenated
(`hubkit.engines.lowered`). ``serve = "each"`` in the recipe's target serves every member by itself, at its weight.
Engines keep caches by name or path, so both carry the digest: what was exchanged is never taken for what was there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hubkit.documents.schema import canonical, sha256
from hubkit.engines.lowered import Lowered, lower
from hubkit.engines.plan import Member, Plan, not_adapters, unknown_codec
from hubkit.errors import HubkitError

SETTINGS = frozenset({"serve", "name", "budget"})
"""What a recipe may set for every engine that serves adapters: what is served, the name of a mix of several, and the
part of a change that may be left out where it is not low-rank."""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Served:
    """One adapter as an engine serves it.

    Args:
        name: of the member, or of the mix.
        digest: of the member's manifest; of the mix with its members' digests and weights where it is more than that.
        lowered: its plain LoRA.
    """

    name: str
    digest: str
    lowered: Lowered

    @property
    def key(self) -> str:
        """``name@0123456789ab``: the name under which it is served, with the first digits of its digest."""
        return f"{self.name}@{self.digest.removeprefix('sha256:')[:12]}"

    @property
    def folder(self) -> str:
        """``name-0123456789ab``: its folder or file in a deployment."""
        return self.key.replace("@", "-")


def served(plan: Plan, *, rank: int | None = None) -> tuple[Served, ...]:
    """The adapters that a deployment of `plan` serves; none for a base alone.

    Args:
        rank: the largest that the engine takes.

    Raises:
        HubkitError: ``HK-LOWER``; ``HK-ENGINE`` for settings that are none; what reading the adapters raises.
    """
    from hubkit.tensors.parts.mix import from_tree, make_mix

    if "served" in plan.made:
        made: tuple[Served, ...] = plan.made["served"]
        return made
    _, base = plan.trained_on()
    adapters, budget = plan.adapters(base, dtype="master"), plan.settings.get("budget")
    found = []
    for name, members in _groups(plan):
        mix = make_mix(plan.mix, [(from_tree(m.tree or m.name), m.weight) for m in members])
        lowered = lower(name, mix, adapters, base, rank=rank, budget=budget)
        found.append(Served(name, _digest(plan.mix, members), lowered))
    plan.made["served"] = tuple(found)
    return tuple(found)


def unservable(plan: Plan, *, rank: int | None = None) -> list[str]:
    """Why the adapters of `plan` cannot be served as plain LoRAs, a line each; empty when they can."""
    reasons = [*not_adapters(plan, mixes=True), *unknown_codec(plan), *_wrong(plan.settings)]
    if reasons:
        return reasons
    try:
        served(plan, rank=rank)
    except HubkitError as error:
        if error.code not in ("HK-LOWER", "HK-RANK", "HK-ENERGY"):
            raise
        return [*error.have] if isinstance(error.have, list | tuple) else [f"{error.what}: {error.have}"]
    return []


def _wrong(settings: Any) -> list[str]:
    """Settings of `SETTINGS` with values that they cannot have."""
    serve, name, budget = settings.get("serve", "mix"), settings.get("name", "mix"), settings.get("budget", 0.0)
    found = [] if serve in ("mix", "each") else [f"serve: want mix or each, have {serve!r}"]
    named = isinstance(name, str) and _NAME.fullmatch(name) is not None  # it becomes the name of a folder, too
    found += [] if named else [f"name: want A-Z a-z 0-9 . _ -, a letter or digit first, have {name!r}"]
    number = isinstance(budget, int | float) and not isinstance(budget, bool) and 0 <= budget < 1
    return found + ([] if number else [f"budget: want a part of a change, 0 <= budget < 1, have {budget!r}"])


def _groups(plan: Plan) -> list[tuple[str, list[Member]]]:
    """(served name, the members that act under it)."""
    members = list(plan.members)
    if plan.settings.get("serve", "mix") == "each" or len(members) < 2:
        return [(member.name, [member]) for member in members]
    return [(plan.settings.get("name", "mix"), members)]


def _digest(kind: str, members: list[Member]) -> str:
    if [member.weight for member in members] == [1.0]:
        return members[0].folder.manifest.digest
    listed = [{"digest": member.folder.manifest.digest, "weight": member.weight} for member in members]
    return sha256(canonical({kind: listed}))
