"""A recipe edited as a person would: one adapter comes, changes or goes; comments and layout stay as they are.

A value is changed by tomlkit, which keeps what it does not touch to the byte. A table of its own, ``[adapters.NAME]``,
comes and goes as lines: to tomlkit the comment above a table is the end of the one before, and would go with that.
Whatever is made of a file is read again and must be the recipe that was meant; otherwise nothing is written.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hubkit.documents.recipe import Recipe, RecipeAdapter, parse_recipe
from hubkit.errors import USAGE, HubkitError, nearest


def new_recipe(base: str) -> bytes:
    """The bytes of a recipe of a base and no adapters."""
    return f"[base]\nsource = {_value(base)}\n".encode()


def with_adapter(data: bytes, where: str, name: str, source: str, weight: float | None) -> bytes:
    """The bytes of a recipe to which an adapter was added, or in which its reference or weight was changed.

    Args:
        data: the recipe.
        where: named in refusals.
        name: of the table ``[adapters.NAME]``.
        source: its reference, as the recipe is to have it.
        weight: None: the one that is there, else 1, which is not written down.

    Raises:
        HubkitError: what `parse_recipe` raises; ``HK-RECIPE`` for a recipe that cannot be edited.
    """
    recipe = parse_recipe(data, where)
    known = {one.name: one for one in recipe.adapters}
    kept = known[name].weight if name in known else 1.0
    wanted = RecipeAdapter(name, source, kept if weight is None else float(weight))
    expected = replace(recipe, adapters=tuple({**known, name: wanted}.values()))
    numbers = [] if wanted.weight == 1.0 else [f"weight = {_value(wanted.weight)}"]

    def edit(text: str) -> str:
        tables = _tables(text)
        if name not in known and (tables or not known):
            lines = ["", f"[adapters.{_key(name)}]", f"source = {_value(source)}", *numbers]
            return _inserted(text, tables[-1].end if tables else None, lines)
        here = [table for table in tables if table.name == name]
        if here and wanted.weight != known[name].weight and not here[0].weighed:
            text = _inserted(text, here[0].end, numbers)
        return _set(text, name, source, wanted.weight, known.get(name))

    return _edited(data, where, edit, expected)


def without_adapters(data: bytes, where: str, names: tuple[str, ...]) -> bytes:
    """The bytes of a recipe from which adapters were taken; comments above and below their tables stay.

    Raises:
        HubkitError: what `parse_recipe` raises; ``HK-UNKNOWN-ADAPTER`` (status 2) for names that it does not have.
    """
    recipe = parse_recipe(data, where)
    known = [one.name for one in recipe.adapters]
    if unknown := [name for name in names if name not in known]:
        near = nearest(unknown[0], known, 1)
        what = f"the recipe has no adapter {', '.join(map(repr, unknown))}"
        have, fix = ", ".join(known) or "no adapters", f"hubkit remove {near[0]}" if near else ""
        raise HubkitError("HK-UNKNOWN-ADAPTER", what, where=where, have=have, fix=fix, status=USAGE)
    expected = replace(recipe, adapters=tuple(one for one in recipe.adapters if one.name not in names))

    def edit(text: str) -> str:
        lines = text.splitlines(keepends=True)
        for table in reversed([table for table in _tables(text) if table.name in names]):
            del lines[table.start : table.end]
            blank = [not "".join(lines[at : at + 1]).strip() for at in (table.start - 1, table.start)]
            if table.start and all(blank):
                del lines[table.start - 1]
        return _deleted("".join(lines), [name for name in names if name not in {t.name for t in _tables(text)}])

    return _edited(data, where, edit, expected)


@dataclass(frozen=True)
class _Table:
    """A table ``[adapters.NAME]``: its lines from the header to the last with a key, and whether one is a weight."""

    name: str
    start: int
    end: int
    weighed: bool


def _tables(text: str) -> list[_Table]:
    lines, found = text.splitlines(), []
    heads = [number for number, line in enumerate(lines) if line.lstrip().startswith("[")]
    for start, stop in zip(heads, [*heads[1:], len(lines)], strict=True):
        try:
            adapters = tomllib.loads(lines[start]).get("adapters")
        except tomllib.TOMLDecodeError:
            continue  # a line of an array, not a header
        if (
            isinstance(adapters, dict)
            and len(adapters) == 1
            and isinstance(table := next(iter(adapters.values())), dict)
        ):
            said = [n for n in range(start, stop) if lines[n].strip() and not lines[n].lstrip().startswith("#")]
            weighed = any(re.match(r"""\s*(["']?)weight\1\s*=""", lines[n]) for n in said)
            if not table:
                found.append(_Table(next(iter(adapters)), start, said[-1] + 1, weighed))
    return found


def _inserted(text: str, at: int | None, added: list[str]) -> str:
    """`text` with lines put in before line number `at`, None: at its end."""
    lines = text.splitlines()
    place = len(lines) if at is None else at
    return "\n".join([*lines[:place], *(added if place else added[1:]), *lines[place:]]) + "\n"


def _set(text: str, name: str, source: str, weight: float, known: RecipeAdapter | None) -> str:
    import tomlkit

    document: Any = tomlkit.parse(text)
    if known is None:
        document["adapters"][name] = tomlkit.inline_table()
    table = document["adapters"][name]
    if table.get("source") != source:
        table["source"] = source
    if float(table.get("weight", 1.0)) != weight:
        table["weight"] = int(weight) if weight.is_integer() else weight
    return tomlkit.dumps(document)


def _deleted(text: str, names: list[str]) -> str:
    """`text` without adapters that have no table of their own."""
    if not names:
        return text
    import tomlkit

    document: Any = tomlkit.parse(text)
    for name in names:
        del document["adapters"][name]
    if not document["adapters"]:
        del document["adapters"]
    return tomlkit.dumps(document)


def _edited(data: bytes, where: str, edit: Callable[[str], str], expected: Recipe) -> bytes:
    """The recipe after `edit`, with its own line ends, proven to be the one that was expected."""
    from tomlkit.exceptions import TOMLKitError

    text = data.decode()
    newline = "\r\n" if "\r\n" in text else "\n"
    try:
        result = edit(text.replace("\r\n", "\n")).replace("\n", newline).encode()
        found = parse_recipe(result, where)
    except (HubkitError, TOMLKitError, KeyError, TypeError, ValueError) as error:
        raise _unedited(where, error.what if isinstance(error, HubkitError) else str(error)) from error
    if found != expected or found.digest != expected.digest:
        raise _unedited(where, "it would come to mean something else")
    return result


def _unedited(where: str, why: str) -> HubkitError:
    what, fix = "the recipe is written in a way that cannot be edited here", "edit it by hand, then: hubkit lock"
    return HubkitError("HK-RECIPE", what, where=where, have=why, fix=fix)


def _value(value: str | float) -> str:
    import tomlkit

    whole = isinstance(value, float) and value.is_integer()
    return tomlkit.item(int(value) if whole else value).as_string()


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)
