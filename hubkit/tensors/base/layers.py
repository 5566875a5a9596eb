"""Layers of a base by number: the layer of a module is the first number in its path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from hubkit.errors import HubkitError

Layers = str | Sequence[int]
T = TypeVar("T")
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def layer_of(name: str) -> int | None:
    """The layer of module `name`; None outside of the layers, as an embedding is."""
    return next((int(step) for step in name.split(".") if step.isdigit()), None)


def layer_numbers(layers: Layers) -> frozenset[int]:
    """The numbers that `layers` means: ``"0-11"``, ``"0-3,8"`` or a list of numbers.

    Raises:
        HubkitError: ``HK-CONFIG``.
    """
    if not isinstance(layers, str):
        wrong: list[str] = [str(number) for number in layers if number < 0]
        chosen = set(layers)
    else:
        pieces = [(piece.strip(), _RANGE.fullmatch(piece.strip())) for piece in layers.split(",")]
        ranges = [(int(m[1]), int(m[2] or m[1])) for _, m in pieces if m]
        wrong = [piece or "(nothing)" for piece, m in pieces if not m]
        wrong += [f"{first}-{last}" for first, last in ranges if last < first]
        chosen = {number for first, last in ranges for number in range(first, last + 1)}
    if wrong:
        raise HubkitError(
            "HK-CONFIG", "layers are numbers and ranges of numbers", want="0-11 or 0,4,8-11", have=", ".join(wrong)
        )
    return frozenset(chosen)


def within(sites: Mapping[str, T], layers: Layers, source: str) -> dict[str, T]:
    """The sites in `layers`.

    Raises:
        HubkitError: ``HK-CONFIG``; ``HK-TARGET`` for layers that the base does not have.
    """
    numbers = layer_numbers(layers)
    at = {name: layer_of(name) for name in sites}
    known = {number for number in at.values() if number is not None}
    missing = sorted(numbers - known)
    if missing:
        raise HubkitError(
            "HK-TARGET",
            "the base has no such layers",
            where=source,
            have=", ".join(map(str, missing)),
            want=f"{min(known)} to {max(known)}" if known else "(its modules are not numbered)",
        )
    return {name: site for name, site in sites.items() if at[name] in numbers}


def outside(target: str, found: Iterable[str], layers: Layers | None, source: str) -> HubkitError:
    """The refusal of a target that names the modules `found`, none of them in the layers asked for: ``HK-TARGET``."""
    return HubkitError(
        "HK-TARGET",
        f"the target {target!r} has no module in the layers asked for",
        where=source,
        want=f"layers {layers}",
        have=sorted(found)[:10],
        fix="leave the target out, or ask for other layers",
    )
