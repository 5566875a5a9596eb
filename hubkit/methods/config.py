"""A method's configuration: from JSON values or the text of ``--set``, checked against its dataclass, and back."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hubkit.errors import HubkitError, nearest

LATER = {"later": True}
"""Metadata of a field that a method got after its first release: what does not use it is written as it was before."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}


def parse_config(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """An instance of the configuration class `cls`.

    Args:
        values: field -> JSON value, or its text as typed on a command line (``8``, ``q_proj,v_proj``, ``a=4,b=8``).

    Raises:
        HubkitError: ``HK-CONFIG`` for an unknown field (with the nearest names) or a value of another type.
    """
    hints = get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in fields]
    if unknown:
        raise HubkitError(
            "HK-CONFIG",
            f"unknown option {', '.join(map(repr, unknown))}",
            where=where,
            want=", ".join(fields),
            have=", ".join(unknown),
            fix=_near(unknown, fields),
        )
    parsed = {}
    for name, value in values.items():
        try:
            parsed[name] = _convert(value, fields[name])
        except (TypeError, ValueError) as e:
            raise HubkitError(
                "HK-CONFIG",
                f"option {name!r} has a value of another type",
                where=f"{where}#/{name}",
                want=_type_name(fields[name]),
                have=repr(value),
            ) from e
    return cls(**parsed)


def _near(unknown: list[str], fields: Mapping[str, Any]) -> str:
    near = [name for u in unknown for name in nearest(u, fields, 1)]
    return f"near: {', '.join(near)}" if near else ""


def config_document(config: Any) -> dict[str, Any]:
    """The configuration as JSON values, mappings sorted: every field, but one marked `LATER` that has its default."""
    later = {f.name for f in dataclasses.fields(config) if f.metadata == LATER and getattr(config, f.name) == f.default}
    return {name: value for name, value in every_option(config).items() if name not in later}


def every_option(config: Any) -> dict[str, Any]:
    """All fields of a configuration, as JSON values, mappings sorted."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _convert(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        if value not in args:
            raise ValueError(value)
        return value
    if origin is tuple and not isinstance(value, Mapping):
        items = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else list(value)
        return tuple(_convert(item, args[0]) for item in items)
    if origin is not None and issubclass(origin, Mapping):
        pairs = _pairs(value) if isinstance(value, str) else dict(value)
        return {str(key): _convert(item, args[1]) for key, item in sorted(pairs.items())}
    return _convert_scalar(value, hint)


def _convert_union(value: Any, args: tuple[Any, ...]) -> Any:
    if value is None and type(None) in args:
        return None
    if isinstance(value, str) and value and "," not in value and str in args:
        return value  # an empty text is an empty list, where a list is possible
    failure: Exception = ValueError(value)
    for option in sorted((a for a in args if a is not type(None)), key=lambda a: a is str):
        try:
            return _convert(value, option)
        except (TypeError, ValueError) as e:
            failure = e
    raise failure


def _convert_scalar(value: Any, hint: Any) -> Any:
    if hint is bool:
        words = {"true": True, "false": False, "yes": True, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise TypeError(value)
    if isinstance(value, bool):
        raise TypeError(value)
    if hint is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(value)
        return int(value)
    if hint is float:
        number = float(value)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(value)
        return number
    if hint is str and isinstance(value, str):
        return value
    raise TypeError(value)


def _pairs(text: str) -> dict[str, str]:
    pairs = dict(item.partition("=")[::2] for item in text.split(",") if item.strip())
    return {key.strip(): value.strip() for key, value in pairs.items()}


def _type_name(hint: Any) -> str:
    """A type in words: what a user may write there."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(arg) for arg in args))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"a list of {_type_name(args[0])}: A,B"
    if origin is not None and issubclass(origin, Mapping):
        return f"names and {_type_name(args[1])}: A=1,B=2"
    return _WORDS.get(hint, str(hint))
