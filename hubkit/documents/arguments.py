"""What a public function was given, looked at before it begins: a value of another type is named, not stumbled over."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from hubkit.errors import USAGE, HubkitError

Function = TypeVar("Function", bound=Callable[..., Any])

_KINDS: Mapping[str, type] = {
    "Any": object, "Callable": cast(type, Callable), "Iterable": Iterable, "Mapping": Mapping, "None": type(None),
    "Path": os.PathLike, "Sequence": Sequence, "bool": bool, "float": Real, "int": Integral, "str": str,
}  # fmt: skip
_ALIASES = {
    "Mix": "str | Sum | Stack | Route",
    "NodeKind": "str",
    "Progress": "Callable",
    "Terms": "str | Path | Sequence | Mapping",
}
_INSIDE = re.compile(r"\[[^\[\]]*\]")


def checked_but(*names: str) -> Callable[[Function], Function]:
    """`checked`, but for arguments that the function looks at itself, in words of its own."""
    return lambda function: checked(function, names)


def checked(function: Function, but: Collection[str] = ()) -> Function:
    """Decorator of a public function: its arguments are compared with its annotations before it runs.

    Annotations are read as text, so nothing is imported for them: a class that is no kind of Python's own is known by
    its name. What is inside a mapping or sequence is the function's own business.

    Raises:
        TypeError: that names the function, the argument, what it may be and what it is.
    """
    code = function.__code__
    annotations = {name: text for name, text in function.__annotations__.items() if name not in but}
    positional = code.co_varnames[: code.co_argcount]

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        for name, value in (*zip(positional, arguments, strict=False), *named.items()):
            if not fits(annotations.get(name, "Any"), value):
                want, have = annotations[name], f"{type(value).__name__}: {value!r:.80}"
                raise TypeError(f"{function.__name__}() takes {name} as {want}, not {have}")
        return function(*arguments, **named)

    return cast(Function, call)


def fits(annotation: str, value: object) -> bool:
    """Whether `value` is of one of the types that the text of an annotation lists."""
    return any(_is(word, value) for word in words_of(annotation))


def words_of(annotation: str) -> list[str]:
    """The types that an annotation lists, without what stands in brackets and modules: ``["Mapping", "None"]``."""
    while (shorter := _INSIDE.sub("", annotation)) != annotation:
        annotation = shorter
    found = [word.rpartition(".")[2] for word in annotation.split(" | ")]
    return [inner for word in found for inner in (words_of(_ALIASES[word]) if word in _ALIASES else [word])]


def _is(word: str, value: object) -> bool:
    if word not in _KINDS:
        return word in {one.__name__ for one in type(value).__mro__}
    if word in ("int", "float") and isinstance(value, bool):
        return False
    if word in ("Sequence", "Iterable") and isinstance(value, str | bytes | bytearray):
        return False
    return isinstance(value, _KINDS[word])


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_of(text: int | str, option: str) -> int:
    """A number of bytes as huggingface_hub spells it: ``5GB``, ``500MB``, ``1.5 GiB``; a number is itself.

    Args:
        option: whose value it is, for the refusal.

    Raises:
        HubkitError: ``HK-OPTIONS`` (status 2) for other text, and for nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(text).strip().upper(), re.ASCII)
    unit = _UNITS.get(found[2] or "B") if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        have = repr(text)
        raise HubkitError("HK-OPTIONS", f"{option} is no size", want="e.g. 5GB or 500MB", have=have, status=USAGE)
    return size


_SPANS = {"m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


def seconds_of(text: str, option: str) -> float:
    """A span of time in seconds: ``30d``, ``2w``, ``12h``, ``90m``.

    Args:
        option: whose value it is, for the refusal.

    Raises:
        HubkitError: ``HK-OPTIONS`` (status 2) for other text.
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*([mhdw])", text.strip().lower(), re.ASCII)
    if found is None:
        want = "a number and m, h, d or w, e.g. 30d"
        raise HubkitError("HK-OPTIONS", f"{option} is no span of time", want=want, have=repr(text), status=USAGE)
    return float(found[1]) * _SPANS[found[2]]


def size(count: int) -> str:
    """A number of bytes for people: ``831 B``, ``9.8 MB`` (powers of 1000)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"
