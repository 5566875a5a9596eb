"""Modules of an adapter that have other names in the base now: between releases of a library, or between libraries.

A kind is a module's name without its numbers (``model.layers.*.mlp.up_proj``). Each kind without a home is given the
one kind of the base that can be it: every number it has is there, every shape fits. What says so is, in this order: the
base's weights are the very ones by their digests; all names behind the first number are equal; the last name is equal;
the last name is known to be called so elsewhere (``renames.json``). Where two can be it, nothing is guessed.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from hubkit.errors import HubkitError, nearest

Dims = frozenset[int]
"""Sizes of the sides of a module's tensors."""


@dataclass(frozen=True)
class Place:
    """A module that the base has.

    Args:
        shape: (out, in) of its weight; None where only its name is known.
        digest: of its weight; empty where it is not known.
    """

    shape: tuple[int, int] | None
    digest: str = ""


@dataclass(frozen=True)
class Renaming:
    """Modules that are called otherwise now.

    Args:
        old: their kind, ``*`` for each number.
        new: their kind in the base.
        modules: how many there are.
        why: what says that the one is the other.
    """

    old: str
    new: str
    modules: int
    why: str


def kind_of(module: str) -> str:
    """A module's name with ``*`` for each number."""
    return ".".join("*" if step.isdigit() else step for step in module.split("."))


def renamings(
    lost: Mapping[str, Dims],
    places: Mapping[str, Place],
    digests: Mapping[str, str],
    taken: Collection[str],
    where: str,
) -> tuple[list[Renaming], dict[str, str]]:
    """What modules without a home are called in the base.

    Args:
        lost: the adapter's modules that the base does not have, with the sizes of their tensors.
        places: what the base has.
        digests: of the weights of the adapter's own base, by module, where they are known.
        taken: modules of the base at which the adapter acts already.
        where: the adapter, for messages.

    Returns:
        a line for each kind; and each module's new name.

    Raises:
        HubkitError: ``HK-MIGRATE`` for modules that nothing can be, that several can be, or two of which are one.
    """
    kinds: dict[str, list[str]] = {}
    for module in lost:
        kinds.setdefault(kind_of(module), []).append(module)
    free = sorted({kind_of(name) for name in places} - {kind_of(name) for name in taken})
    made: list[Renaming] = []
    names: dict[str, str] = {}
    faults: list[str] = []
    for kind, modules in sorted(kinds.items()):
        fitting = [one for one in free if _fits(one, modules, lost, places)]
        why, found = _likeliest(kind, modules, fitting, places, digests)
        if len(found) == 1:
            made.append(Renaming(kind, found[0], len(modules), why))
            names |= {module: _numbered(found[0], module) for module in modules}
        else:
            faults.append(f"{kind} ({len(modules)}): {_said(found, fitting, free, kind)}")
    twice = {one.new for one in made if sum(one.new == other.new for other in made) > 1}
    faults += [f"{one.old}: {one.new}, which another one would be, too" for one in made if one.new in twice]
    if faults:
        raise HubkitError(
            "HK-MIGRATE",
            f"{len(faults)} kinds of modules have no certain place in the base",
            where=where,
            want="one module of the base for each, of its shape",
            have=faults,
            fix="--rename OLD=NEW, beginnings of names; or --base with the base that it was trained on",
        )
    return made, names


def _likeliest(
    kind: str, modules: Sequence[str], fitting: Sequence[str], places: Mapping[str, Place], digests: Mapping[str, str]
) -> tuple[str, list[str]]:
    """The best reason that any of `fitting` is `kind`, and those that have it."""

    def same(other: str) -> bool:
        pairs = [(digests.get(module, ""), places[_numbered(other, module)].digest) for module in modules]
        return all(mine and mine == theirs for mine, theirs in pairs)

    tests: Iterable[tuple[str, Callable[[str], bool]]] = (
        ("the same weights, by their digests", same),
        ("the same names behind the first number", lambda other: _tail(other) == _tail(kind) != ""),
        ("the same last name", lambda other: _last(other) == _last(kind)),
        ("a last name that is known elsewhere", lambda other: frozenset((_last(other), _last(kind))) in _synonyms()),
    )
    for why, test in tests:
        if found := [one for one in fitting if test(one)]:
            return why, found
    return "", []


def _fits(kind: str, modules: Iterable[str], lost: Mapping[str, Dims], places: Mapping[str, Place]) -> bool:
    """Whether every module can be one of a kind: it is there, and the sizes are those of its weight."""
    for module in modules:
        place = places.get(_numbered(kind, module))
        if place is None or (place.shape is not None and not set(place.shape) <= lost[module]):
            return False
    return True


def _numbered(kind: str, module: str) -> str:
    """A kind with the numbers of `module`; no module's name where their count is another."""
    numbers = [step for step in module.split(".") if step.isdigit()]
    if kind.split(".").count("*") != len(numbers):
        return ""
    left = iter(numbers)
    return ".".join(next(left) if step == "*" else step for step in kind.split("."))


def _tail(kind: str) -> str:
    return kind.partition(".*.")[2]


def _last(kind: str) -> str:
    return kind.rpartition(".")[2]


@functools.cache
def _synonyms() -> frozenset[frozenset[str]]:
    rows = json.loads((files("hubkit.adopting") / "renames.json").read_text("utf-8"))
    return frozenset(frozenset(row["names"]) for row in rows)


def _said(found: Sequence[str], fitting: Sequence[str], free: Sequence[str], kind: str) -> str:
    if found:
        return f"may be {' or '.join(found)}"
    if fitting:
        return f"of its shape: {', '.join(fitting[:4])}"
    near = nearest(kind, free)
    return f"nothing of its shape{f'; by name near {near[0]}' if near else ''}"


def renamed_config(config: Mapping[str, Any], names: Mapping[str, str], kept: Collection[str]) -> dict[str, Any]:
    """A configuration of PEFT whose modules are called otherwise now: what it lists, and its patterns.

    Args:
        names: old name of each renamed module -> its new one.
        kept: the other modules that the adapter acts at.
    """
    made = dict(config)
    if isinstance(made.get("target_modules"), str):  # an expression for old names
        made["target_modules"] = [*names, *kept]
    for key in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(made.get(key), list):
            made[key] = sorted({new for one in made[key] for new in _ends(str(one), names, kept)})
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(made.get(key), dict):
            made[key] = _patterned(made[key], names)
    return made


def _ends(end: str, names: Mapping[str, str], kept: Collection[str]) -> set[str]:
    """What an end of old names is among the new ones."""
    steps = end.count(".") + 1
    found = {".".join(new.split(".")[-steps:]) for old, new in names.items() if f".{old}".endswith(f".{end}")}
    return found | ({end} if not found or any(f".{one}".endswith(f".{end}") for one in kept) else set())


def _patterned(patterns: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Patterns of rank or alpha, with a line of its own for each renamed module that one of them matched."""
    from hubkit.methods.patterns import pattern_value

    found = {re.escape(new): pattern_value(patterns, old, None) for old, new in names.items()}
    return {**{name: value for name, value in found.items() if value is not None}, **patterns}
