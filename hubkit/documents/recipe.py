"""The recipe, ``hubkit.toml``: which adapters act together on which base. Written by people, so every typo is named.

::

    mix = "sum"                          # or "stack"; the order of the tables is the order of the mix

    [base]
    source = "HuggingFaceTB/SmolLM2-135M-Instruct"
    revision = "main"

    [adapters.chat]
    source = "ana/chat@^1.2"

    [adapters.sql]
    source = "./sql"
    weight = -0.5

    [targets.vllm]                       # free: the engine reads it
    max_loras = 4

    [policy]                             # what ``hubkit lock`` refuses to pin
    licenses = ["Apache-2.0", "MIT"]
    require-probes = true
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hubkit.documents.files import read
from hubkit.documents.schema import KINDS, canonical, check, load_schema, refuse_secrets, sha256
from hubkit.errors import HubkitError, nearest

RECIPE_NAME = "hubkit.toml"
SCHEMA = "hubkit/recipe/1"
MAX_BYTES = 1 << 20
MixKind = Literal["sum", "stack"]


@dataclass(frozen=True)
class RecipeBase:
    """The base a recipe asks for: a reference, and a branch, tag or commit (None: the default branch)."""

    source: str
    revision: str | None = None


@dataclass(frozen=True)
class RecipeAdapter:
    """One adapter of a recipe: its name there, its reference, its weight in the mix."""

    name: str
    source: str
    weight: float = 1.0


@dataclass(frozen=True)
class Policy:
    """What an adapter has to be before a lock may pin it.

    Args:
        licenses: SPDX identifiers that are allowed; empty: any licence, and none.
        require_probes: every adapter carries behaviour probes.
    """

    licenses: tuple[str, ...] = ()
    require_probes: bool = False

    def to_document(self) -> dict[str, Any]:
        """The table ``[policy]`` as JSON, by the names it has there; what demands nothing is left out."""
        found = {"licenses": list(self.licenses), "require-probes": self.require_probes}
        return {name: value for name, value in found.items() if value}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Policy:
        """Read a checked table or JSON object."""
        return cls(tuple(document.get("licenses", ())), document.get("require-probes", False))


@dataclass(frozen=True)
class Recipe:
    """A recipe as read.

    Args:
        base: the base asked for.
        adapters: in the order of the mix.
        mix: ``sum``: every adapter sees the base; ``stack``: each sees the base with those before it.
        targets: engine -> its settings, free.
        policy: what a lock refuses to pin.
    """

    base: RecipeBase
    adapters: tuple[RecipeAdapter, ...] = ()
    mix: MixKind = "sum"
    targets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)

    def to_document(self) -> dict[str, Any]:
        """The recipe's content as JSON, defaults written out and adapters as a list: what ``digest`` is taken of.

        A policy that demands nothing is left out, so that recipes without one keep their digest.
        """
        base, policy = {"source": self.base.source, "revision": self.base.revision}, self.policy.to_document()
        return {
            "schema": SCHEMA,
            "base": {key: value for key, value in base.items() if value is not None},
            "adapters": [{"name": a.name, "source": a.source, "weight": a.weight} for a in self.adapters],
            "mix": self.mix,
            "targets": self.targets,
            **({"policy": policy} if policy else {}),
        }

    @property
    def digest(self) -> str:
        """Digest of the content: comments, layout and spelled-out defaults do not change it; a lock quotes it."""
        return sha256(canonical(self.to_document()))


def read_recipe(path: Path) -> Recipe:
    """Read a ``hubkit.toml``.

    Args:
        path: the file, or the folder it is in.

    Raises:
        HubkitError: ``HK-MISSING``; ``HK-RECIPE`` for faults of TOML, with the line, and for every unknown key, with
            the nearest names, and wrong value; ``HK-NEWER``; ``HK-SECRET`` for a token in it.
    """
    path = path / RECIPE_NAME if path.is_dir() else path
    return parse_recipe(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """The bytes of the recipe at `path`, whatever they are.

    Raises:
        HubkitError: ``HK-MISSING``, ``HK-IO``.
    """
    try:
        return read(path, MAX_BYTES)
    except FileNotFoundError:
        what, fix = "there is no recipe", f"write a {RECIPE_NAME} with a table [base]"
        raise HubkitError("HK-MISSING", what, where=str(path), want=RECIPE_NAME, fix=fix) from None


def parse_recipe(data: bytes, where: str) -> Recipe:
    """Read the bytes of a recipe; see ``read_recipe``."""
    if has_conflicts(data):
        fix = "choose between the lines that git left there, then: hubkit lock"
        raise HubkitError("HK-RECIPE", "the recipe holds unresolved merge conflicts", where=where, fix=fix)
    document = _load(data, where)
    found = [*_foreign(document, ()), *_unknown(document)]
    if found:
        raise HubkitError("HK-RECIPE", "the recipe holds what is not understood", where=where, have=found)
    document.setdefault("schema", SCHEMA)
    try:
        check(document, "recipe", where)
    except HubkitError as error:
        if error.code != "HK-SCHEMA":
            raise
        have = [re.sub(r"^#/?([^:]*)", lambda match: match[1].replace("/", "."), line) for line in error.have]
        fix = f"see hubkit.schemas/recipe-{KINDS['recipe']}.json"
        raise HubkitError("HK-RECIPE", "the recipe is not valid", where=error.where, have=have, fix=fix) from None
    refuse_secrets(document, "recipe")
    return Recipe(
        base=RecipeBase(**document["base"]),
        adapters=tuple(
            RecipeAdapter(name, table["source"], float(table.get("weight", 1.0)))
            for name, table in document.get("adapters", {}).items()
        ),
        mix=document.get("mix", "sum"),
        targets=document.get("targets", {}),
        policy=Policy.from_document(document.get("policy", {})),
    )


def has_conflicts(data: bytes) -> bool:
    """Whether git left a merge conflict in the bytes of a document."""
    return re.search(rb"^<{7} ", data, re.MULTILINE) is not None


def _load(data: bytes, where: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise HubkitError("HK-RECIPE", "the recipe is not UTF-8", where=f"{where}:{line}") from None
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        match = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        place = f"{where}:{match[1]}:{match[2]}" if match else where
        have = str(error)[: match.start()] if match else str(error)[:200]
        what, fix = "the recipe is not valid TOML", "https://toml.io explains the format"
        raise HubkitError("HK-RECIPE", what, where=place, have=have, fix=fix) from None


def _foreign(value: Any, at: tuple[str, ...]) -> Iterator[str]:
    """Values that TOML has and JSON has not: a lock could not quote them."""
    if len(at) > 60:
        yield f"{'.'.join(at[:5])}...: far too deeply nested"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _foreign(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _foreign(item, (*at, str(index)))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{'.'.join(at)}: {value} is not a finite number"
    elif isinstance(value, int) and abs(value) >= 2**53:
        yield f"{'.'.join(at)}: {str(value)[:40]} is beyond 2^53; write it as text"
    elif not isinstance(value, str | int | float):
        yield f"{'.'.join(at)}: a date or time; write it as text"


def _unknown(document: dict[str, Any]) -> Iterator[str]:
    schema = load_schema("recipe")["properties"]
    yield from _unknown_in(document, ["schema", *schema], "")
    for table in ("base", "policy"):
        yield from _unknown_in(document.get(table), schema[table]["properties"], f"{table}.")
    adapters = document.get("adapters")
    for name, table in adapters.items() if isinstance(adapters, dict) else ():
        yield from _unknown_in(table, schema["adapters"]["additionalProperties"]["properties"], f"adapters.{name}.")


def _unknown_in(table: Any, known: Any, at: str) -> Iterator[str]:
    for key in table if isinstance(table, dict) else ():
        if key not in known:
            near = nearest(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            yield f"{at}{key}: unknown key; {hint}"
