"""YAML front matter, edited in place: the keys asked for change, every other byte stays.

PyYAML reads it, as text only (no tags, dates or numbers are built), within limits: it comes from strangers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hubkit.errors import HubkitError

MAX_FRONT = 128 << 10
MAX_ALIASES = 16
MAX_DEPTH = 32
INDEX = "model-index"
"""The key of a card in which the Hub looks for results of evaluations."""
SOURCE = "hubkit eval"
"""How results say that they came from here."""
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.MULTILINE | re.DOTALL)


def split(text: str) -> tuple[str, str]:
    """A card's front matter, its two fences included, and the rest; the first is empty when there is none."""
    match = _FRONT.match(text)
    return (match.group(), text[match.end() :]) if match else ("", text)


def merge(
    head: str,
    wanted: Mapping[str, str],
    absent: Mapping[str, str],
    tags: Sequence[str],
    newline: str,
    ours: tuple[str, ...] = (),
) -> str:
    """Front matter with some keys set.

    Args:
        head: as ``split`` gave it, may be empty.
        wanted: key -> value, written whatever was there.
        absent: key -> value, written only where the key is missing.
        tags: added to the list `tags`, those there stay.
        newline: the card's line end.
        ours: how tags begin that stay only where they are among `tags`.

    Returns:
        the front matter with its fences; the same text when nothing had to change.

    Raises:
        HubkitError: ``HK-CARD`` for what is no YAML mapping, or beyond the limits.
    """
    match = _FRONT.match(head)
    opening, yaml, closing = _parts(match, newline)
    before = _read(yaml)
    listed = _listed(before.get("tags"))
    known = [tag for tag in listed if tag in tags or not str(tag).startswith(ours)]
    target: dict[str, Any] = {**wanted, **{key: value for key, value in absent.items() if key not in before}}
    missing = [tag for tag in tags if tag not in known]
    if missing or known != listed:
        target["tags"] = known + missing
    changes = {key: value for key, value in target.items() if before.get(key) != value}
    if not changes:
        return opening + yaml + closing
    edited = _edit(yaml, changes, newline)
    if _try_read(edited) != {**before, **changes}:
        fix = f"write {', '.join(sorted(changes))} as 'key: value', one a line, without anchors or braces"
        raise HubkitError("HK-CARD", "the front matter cannot be edited in place", where="README.md", fix=fix)
    return opening + edited + closing


def indexed(head: str, name: str, results: Sequence[Mapping[str, Any]], newline: str) -> str:
    """Front matter with the key ``model-index``, in which the Hub looks for results of evaluations.

    What another tool or a person wrote there stays as it is: the list is ours only while all its results are.

    Args:
        head: with its fences, as `merge` gives it.
        name: of the adapter.
        results: as the Hub has them; none: the key goes, where it is ours.

    Raises:
        HubkitError: ``HK-CARD``.
    """
    opening, yaml, closing = _parts(_FRONT.match(head), newline)
    before = _read(yaml)
    there = before.get(INDEX)
    if (there is None and not results) or (there is not None and not _is_ours(there)):
        return head
    made = {INDEX: [{"name": name, "results": [dict(result) for result in results]}]} if results else {INDEX: None}
    wanted = _read(_dump(made, newline)) if results else {}
    if wanted.get(INDEX) == there:
        return head
    edited = _edit(yaml, made, newline)
    if _try_read(edited) != {**{key: value for key, value in before.items() if key != INDEX}, **wanted}:
        fix = f"take {INDEX} out of the front matter; it is written anew"
        raise HubkitError("HK-CARD", "the front matter cannot be edited in place", where="README.md", fix=fix)
    return opening + edited + closing


def _is_ours(index: Any) -> bool:
    """Whether every result of a ``model-index`` came from here; one without any is a person's."""
    try:
        results = [result for model in index for result in model["results"]]
        return bool(results) and all(result["source"]["name"] == SOURCE for result in results)
    except (TypeError, KeyError):
        return False


def _parts(match: re.Match[str] | None, newline: str) -> tuple[str, str, str]:
    if match is None:
        return f"---{newline}", "", f"---{newline}"
    whole, yaml = match.group(), match.group(1)
    at = match.start(1)
    return whole[:at], yaml, whole[at + len(yaml) :]


def _read(yaml: str) -> dict[str, Any]:
    """The mapping, all scalars as text."""
    library = _yaml()

    if len(yaml) > MAX_FRONT:
        raise _bad(f"{len(yaml)} characters", f"at most {MAX_FRONT}")
    try:
        _check_limits(library, library.parse(yaml, Loader=library.BaseLoader))
        value = library.load(yaml, Loader=library.BaseLoader)
    except library.MarkedYAMLError as error:
        mark = error.problem_mark
        raise _bad(f"line {mark.line + 2}: {error.problem}" if mark else str(error)) from None
    except (library.YAMLError, RecursionError, TypeError) as error:
        raise _bad(str(error).splitlines()[0][:200]) from None
    if value in (None, ""):
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _bad("something else", "a mapping of keys to values")
    return value


def _check_limits(library: Any, events: Iterable[Any]) -> None:
    """Refuse what a few bytes make expensive: deep nesting (PyYAML needs quadratic time) and aliases upon aliases."""
    aliases = depth = 0
    for event in events:
        aliases += isinstance(event, library.AliasEvent)
        depth += isinstance(event, library.CollectionStartEvent) - isinstance(event, library.CollectionEndEvent)
        if aliases > MAX_ALIASES:
            raise _bad("many aliases", f"at most {MAX_ALIASES}")
        if depth > MAX_DEPTH:
            raise _bad("deep nesting", f"at most {MAX_DEPTH} levels")


def _try_read(yaml: str) -> dict[str, Any] | None:
    try:
        return _read(yaml)
    except HubkitError:
        return None


def _edit(yaml: str, changes: Mapping[str, Any], newline: str) -> str:
    """Replace the lines of each key, last one first so that positions hold; new keys go to the end, None takes out."""
    library = _yaml()

    root = library.compose(yaml, Loader=library.BaseLoader)
    lines = yaml.splitlines(keepends=True)
    places = [
        (key.start_mark.line, _last_line(lines, key.start_mark.line, value.end_mark), key.value)
        for key, value in (root.value if isinstance(root, library.MappingNode) else [])
        if key.value in changes
    ]
    for first, stop, name in sorted(places, reverse=True):
        lines[first:stop] = [] if changes[name] is None else [_dump({name: changes[name]}, newline)]
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += newline
    there = {name for _, _, name in places}
    return "".join(lines) + "".join(_dump({name: changes[name]}, newline) for name in changes if name not in there)


def _last_line(lines: list[str], first: int, end: Any) -> int:
    """One past the last line of a value; comments and blank lines that follow it are not part of it."""
    stop = int(end.line) + (1 if end.column else 0)
    while stop > first + 1 and re.match(r"\s*(#|$)", lines[stop - 1]):
        stop -= 1
    return max(stop, first + 1)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [value] if value else []


def _yaml() -> Any:
    import yaml

    return yaml


def _dump(values: Mapping[str, Any], newline: str) -> str:
    library = _yaml()

    text: str = library.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=10_000)
    return text.replace("\n", newline)


def _bad(have: str, want: str = "a YAML mapping between two lines ---") -> HubkitError:
    fix = "mend the lines between the two --- at the top"
    return HubkitError(
        "HK-CARD", "the model card's front matter is not valid", where="README.md", want=want, have=have, fix=fix
    )
