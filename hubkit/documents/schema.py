"""What all documents share: strict JSON in, canonical JSON out, digests, schemas.

JSON comes from strangers, so what two readers could understand differently is refused: duplicate keys, NaN, lone
surrogates. Canonical bytes are RFC 8785; every digest in a document reads ``sha256:<64 hex digits>``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from hubkit.documents.files import write
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

__all__ = ["KINDS", "canonical", "check", "is_canonical", "parse", "pointer", "sha256", "write"]

KINDS = {"manifest": 1, "recipe": 1, "lock": 1, "deployment": 1, "bundle": 1, "probes": 1}
"""Kinds of documents and the major version this hubkit writes and reads."""
MAX_BYTES = 32 << 20
MAX_DEPTH = 64
MAX_SHOWN = 200
SAFE_INTEGER = 2**53 - 1
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_OTHER_NUMBER = re.compile(rb"(?:\":|[,\[])-?(?:[0-9]+(?:\.[0-9]+)?[eE]|[0-9]+\.0+[\],}]|[0-9]{16})")
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}|://[^/\s?#@]*:[^/\s?#@]+@")


class _NotStrict(Exception):
    """What the JSON decoder's callbacks have to say."""


def parse(data: bytes, where: str) -> dict[str, Any]:
    """Read one JSON object strictly.

    An integer beyond 2^53 becomes a float when the float's canonical form has the same digits, so that canonical bytes
    read back as what was written; otherwise it stays an int (other people's documents hold such).

    Args:
        data: the document, UTF-8 without a byte order mark, at most 32 MiB, at most 64 levels deep.
        where: named in the refusal.

    Raises:
        HubkitError: ``HK-JSON``.
    """
    if len(data) > MAX_BYTES:
        raise _bad(where, f"{len(data)} bytes", f"at most {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8")
        document = _decoder().decode(text)
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(where, f"byte {error.start} is not UTF-8", "UTF-8") from None
    except UnicodeEncodeError:
        raise _bad(where, "half of a surrogate pair", "whole characters") from None
    except json.JSONDecodeError as error:
        raise _bad(where, f"line {error.lineno}, column {error.colno}: {error.msg}", "one JSON object") from None
    except RecursionError:
        raise _bad(where, "far too deeply nested", f"at most {MAX_DEPTH} levels") from None
    except (_NotStrict, ValueError) as error:
        raise _bad(where, str(error), "strict JSON") from None
    if not isinstance(document, dict):
        raise _bad(where, f"a JSON {_json_name(document)}", "a JSON object")
    if _too_deep(document):
        raise _bad(where, f"more than {MAX_DEPTH} levels", f"at most {MAX_DEPTH} levels")
    return document


def canonical(document: Mapping[str, Any]) -> bytes:
    """The RFC 8785 bytes of a document: sorted keys, no white space, no trailing newline; ``parse`` gives it back.

    Raises:
        HubkitError: ``HK-JSON`` for what JSON cannot hold: NaN, integers beyond 2^53, other types, too deep nesting.
    """
    import rfc8785

    try:
        plain = _plain(document, 0)
        quick = _quick(plain)
        return rfc8785.dumps(plain) if quick is None else quick
    except (rfc8785.CanonicalizationError, _NotStrict, UnicodeError) as error:
        fix = "write large whole numbers as text"
        raise HubkitError("HK-JSON", "a value cannot be written as JSON", have=str(error), fix=fix) from error


def is_canonical(data: bytes, document: Mapping[str, Any]) -> bool:
    """Whether `data` are the canonical bytes of `document`.

    Raises:
        HubkitError: as ``canonical``.
    """
    return _quick(document) == data or canonical(document) == data


def _quick(document: Mapping[str, Any]) -> bytes | None:
    """The canonical bytes by the standard library's encoder, ten times as fast; None where they may be others.

    It writes RFC 8785, too, where all is ASCII and no number has another form in JavaScript (an exponent, a trailing
    ``.0``, 16 digits before the point).
    """
    try:
        data = _encoder().encode(document).encode()
    except (TypeError, ValueError, UnicodeError, RecursionError):
        return None
    return data if data.isascii() and not _OTHER_NUMBER.search(data) else None


def sha256(data: bytes | memoryview) -> str:
    """``sha256:<64 hex digits>`` of `data`: the form of every digest in a document."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check(document: Mapping[str, Any], kind: str, where: str) -> None:
    """Hold a document against the published schema of its kind.

    Args:
        document: as ``parse`` returned it.
        kind: one of ``KINDS``.
        where: named in the refusal, before each JSON pointer.

    Raises:
        HubkitError: ``HK-NEWER`` for a newer major, whatever else the document holds; ``HK-SCHEMA`` for a missing or
            foreign ``schema`` and for every violation, each with its JSON pointer.
    """
    _check_major(document, kind, where)
    found = list(_violations(document, kind))
    if found:
        shown = found[:MAX_SHOWN] + ([f"and {len(found) - MAX_SHOWN} more"] if len(found) > MAX_SHOWN else [])
        want = f"hubkit.schemas/{kind}-{KINDS[kind]}.json"
        raise HubkitError("HK-SCHEMA", f"the {kind} is not valid", where=where, want=want, have=shown)


def is_secret(text: str) -> bool:
    """Whether a text holds an access token, or a URL with a password."""
    return _SECRET.search(text) is not None


def refuse_secrets(document: Mapping[str, Any], kind: str) -> None:
    """Refuse a document that holds an access token or a URL with a password.

    Raises:
        HubkitError: ``HK-SECRET`` with the JSON pointers, never the values.
    """
    found = [at for at, text in _strings(document, "#") if _SECRET.search(text)]
    if found:
        fix = "take the token out: hubkit reads it from the environment or from `hf auth login`"
        raise HubkitError("HK-SECRET", f"the {kind} holds an access token or password", have=found, fix=fix)


def pointer(path: Iterable[str | int]) -> str:
    """The JSON pointer of a place in a document, as a URL fragment: ``#/files/0/size``."""
    return "#" + "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)


def _bad(where: str, have: str, want: str) -> HubkitError:
    return HubkitError("HK-JSON", "this is not the JSON it should be", where=where, want=want, have=have)


@cache
def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float, parse_int=_int)


@cache
def _encoder() -> json.JSONEncoder:
    return json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else []
        raise _NotStrict(f"keys that occur twice: {', '.join(map(repr, twice)) or 'several'}")
    return made


def _constant(name: str) -> float:
    raise _NotStrict(f"{name} is not a JSON number")


def _float(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise _NotStrict(f"{literal[:40]} is beyond the range of a number")
    return value


def _int(literal: str) -> int | float:
    value = int(literal)  # ValueError beyond 4300 digits
    if -SAFE_INTEGER <= value <= SAFE_INTEGER:
        return value
    import rfc8785

    try:
        number = float(value)
        return number if rfc8785.dumps(number) == literal.encode() else value
    except OverflowError:
        return value


def _too_deep(document: Any) -> bool:
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _plain(value: Any, depth: int) -> Any:
    if not isinstance(value, Mapping | list | tuple):
        whole = type(value) is float and abs(value) <= SAFE_INTEGER and value.is_integer()
        return int(value) if whole else value  # 1.0 and 1 are one number
    if depth >= MAX_DEPTH:
        raise _NotStrict(f"more than {MAX_DEPTH} levels")
    if not isinstance(value, Mapping):
        return [_plain(item, depth + 1) for item in value]
    if any(not isinstance(key, str) for key in value):
        raise _NotStrict("a key that is not text")
    return {key: _plain(item, depth + 1) for key, item in value.items()}


def _json_name(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _check_major(document: Mapping[str, Any], kind: str, where: str) -> None:
    name, major = document.get("schema"), KINDS[kind]
    match = re.fullmatch(rf"hubkit/{kind}/([1-9][0-9]{{0,8}})", name) if isinstance(name, str) else None
    if match is None:
        have = repr(name)[:80] if "schema" in document else "no field 'schema'"
        what = f"this is not a hubkit {kind}"
        raise HubkitError("HK-SCHEMA", what, where=f"{where}#/schema", want=f"hubkit/{kind}/{major}", have=have)
    if int(match[1]) > major:
        want, have = f"hubkit/{kind}/{major} at most", str(name)
        what, fix = f"this {kind} was written by a newer hubkit", "pip install --upgrade hubkit-adapters"
        raise HubkitError("HK-NEWER", what, where=f"{where}#/schema", want=want, have=have, fix=fix)


def _violations(document: Mapping[str, Any], kind: str) -> Iterator[str]:
    errors = sorted(_validator(kind).iter_errors(document), key=lambda error: [str(step) for step in error.path])
    for error in errors:
        message = error.message if len(error.message) <= 300 else f"{error.message[:120]} ... {error.message[-120:]}"
        yield f"{pointer(error.absolute_path)}: {message}"


@cache
def _validator(kind: str) -> Validator:
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    schemas = {name: load_schema(name) for name in KINDS}
    registry: Any = Registry().with_resources(
        (schema["$id"], Resource.from_contents(schema)) for schema in schemas.values()
    )
    return Draft202012Validator(schemas[kind], registry=registry)


def load_schema(kind: str) -> dict[str, Any]:
    """The published JSON Schema (2020-12) of a kind of document."""
    from importlib.resources import files

    schema: dict[str, Any] = json.loads(files("hubkit.schemas").joinpath(f"{kind}-{KINDS[kind]}.json").read_bytes())
    return schema


def _strings(value: Any, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(item, at + pointer([key])[1:])
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _strings(item, f"{at}/{index}")
