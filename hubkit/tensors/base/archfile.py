"""The table of architectures: ``arch.json``, and over it the JSON file that ``HUBKIT_ARCH`` names.

A user's file has the form of ``arch.json``: ``{"<model_type>": {"<key>": value}}``, keys as `Arch` in arch.py
describes them, and ``like``, the type whose layers (``layers``, ``sublayers``, ``without``) it shares. A key that it
gives takes the place of the shipped one; everything else stays. It is read once per process.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from hubkit.errors import HubkitError, nearest

VARIABLE = "HUBKIT_ARCH"
Table = dict[str, dict[str, Any]]
Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _expression(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


KINDS: dict[str, tuple[Check, str]] = {
    "adapterhub": (
        lambda v: isinstance(v, dict) and all(isinstance(path, str) for path in v.values()),
        "names to paths",
    ),
    "attention": (_text, "a class name"),
    "cache": (_words, "a list of names"),
    "counted_positions": (_flag, "true or false"),
    "embeddings": (_words, "a list of names"),
    "encoder": (lambda v: isinstance(v, dict), "an object"),
    "experts": (_expression, "a regular expression"),
    "experts_turned": (_flag, "true or false"),
    "head_bias": (_text, "a name"),
    "heads": (lambda v: _words(v) and bool(v), "a list of names, not empty"),
    "hiding_masks": (_flag, "true or false"),
    "layers": (_words, "a list of paths"),
    "learned_positions": (_flag, "true or false"),
    "like": (_text, "a model type of the table"),
    "multi_query": (_flag, "true or false"),
    "norms": (_expression, "a regular expression"),
    "prefix": (_text, "a prefix"),
    "relative_positions": (_flag, "true or false"),
    "shared_inputs": (lambda v: isinstance(v, list) and all(map(_words, v)), "a list of lists of names"),
    "since": (lambda v: type(v) is int, "a major release of transformers"),
    "skipped": (_expression, "a regular expression"),
    "towers": (_expression, "a regular expression"),
    "sublayers": (lambda v: isinstance(v, list) and all(isinstance(one, dict) for one in v), "a list of objects"),
    "tokens_since": (lambda v: type(v) is int, "a major release of transformers"),
    "transposed": (_words, "a list of names"),
    "without": (
        lambda v: isinstance(v, dict) and v.keys() <= {"kv", "tokens"} and all(map(_text, v.values())),
        "kv or tokens to reasons",
    ),
}
"""Key of an architecture -> what its value must be."""

ENCODER: dict[str, tuple[Check, str]] = {
    "attention": (lambda v: _words(v) and bool(v), "a list of class names, not empty"),
    "counted_positions": (_flag, "true or false"),
    "first_position": (_words, "a list of class names"),
}
SUBLAYER: dict[str, tuple[Check, str]] = {
    "role": (lambda v: v in ("attention", "feedforward"), "attention or feedforward"),
    "name": (_text, "a path"),
    "residual": (_text, "a path"),
    "output": (_text, "a path"),
    "projection": (_text, "a path"),
    "argument": (lambda v: type(v) is int and v >= 0, "a whole number >= 0"),
    "norm": (_text, "a path"),
    "multiplier": (_text, "a key of the configuration"),
    "when": (lambda v: isinstance(v, dict), "an object"),
}
NEEDED = {"encoder": {"attention"}, "sublayers": {"role", "name", "residual"}}


def table() -> Table:
    """Model type -> its facts; under ``default`` what holds for all.

    Raises:
        HubkitError: ``HK-ARCH-FILE`` for a user's file that cannot be used, with every fault in it.
    """
    return _table(chosen())


def chosen() -> str:
    """The user's file, or an empty text."""
    return os.environ.get(VARIABLE, "")


@functools.cache
def _table(path: str) -> Table:
    shipped: Table = json.loads((files("hubkit.tensors.base") / "arch.json").read_text("utf-8"))
    if not path:
        return shipped
    own = _read(Path(path))
    faults = list(_faults(own, shipped))
    if faults:
        raise _refused("the file of architectures is not usable", path, have=faults)
    return {**shipped, **{kind: {**shipped.get(kind, {}), **facts} for kind, facts in own.items()}}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise _refused(
            "the file of architectures cannot be read", str(path), have=error.strerror or str(error)
        ) from None
    except (ValueError, RecursionError) as error:
        raise _refused("the file of architectures is not JSON", str(path), have=str(error)) from None


def _refused(what: str, path: str, have: str | list[str]) -> HubkitError:
    want = '{"<model_type>": {"<key>": value}}, keys: ' + ", ".join(KINDS)
    return HubkitError("HK-ARCH-FILE", what, where=path, want=want, have=have, fix=f"mend it, or unset {VARIABLE}")


def _faults(own: Any, shipped: Table) -> Iterator[str]:
    if not isinstance(own, dict):
        yield f"{type(own).__name__}, not an object"
        return
    for kind, facts in own.items():
        yield from _wrong(kind, facts, KINDS)
        if not isinstance(facts, dict):
            continue
        like = facts.get("like")
        if _text(like) and like not in shipped and like not in own:
            yield f"{kind}.like: {like!r} is no type of the table"
        if isinstance(facts.get("encoder"), dict):
            yield from _wrong(f"{kind}.encoder", facts["encoder"], ENCODER, NEEDED["encoder"])
        for number, one in enumerate(facts["sublayers"] if isinstance(facts.get("sublayers"), list) else []):
            if isinstance(one, dict):
                yield from _wrong(f"{kind}.sublayers[{number}]", one, SUBLAYER, NEEDED["sublayers"])


def _wrong(
    where: str, facts: Any, kinds: Mapping[str, tuple[Check, str]], needed: set[str] | None = None
) -> Iterator[str]:
    if not isinstance(facts, dict):
        yield f"{where}: {json.dumps(facts)[:60]}, want an object"
        return
    for key, value in facts.items():
        if key not in kinds:
            near = nearest(key, kinds, 1)
            yield f"{where}.{key}: unknown key{f', near: {near[0]}' if near else ''}"
        elif not kinds[key][0](value):
            yield f"{where}.{key}: {json.dumps(value)[:60]}, want {kinds[key][1]}"
    yield from (f"{where}.{key}: missing" for key in sorted((needed or set()) - facts.keys()))
