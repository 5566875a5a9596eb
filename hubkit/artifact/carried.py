"""Adapters of PEFT that no method here can run: their form as data, enough to bind them to a base and publish them.

Their manifest names the method ``peft:TYPE``, their tensors are PEFT's own, to the byte. What is known of each type is
how the names of its tensors begin, so that each is found at a module of the base; shapes are PEFT's business.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Final

from hubkit.artifact.forms import HELD, PEFT_PREFIX
from hubkit.errors import HubkitError

MARK: Final = "peft:"
_WHOLE: Final = frozenset({"prefix_task_cols", "prefix_task_rows", "prompt_embeddings"})
"""Tensors of types that put tokens in front of the text."""


@functools.cache
def types() -> Mapping[str, str]:
    """PEFT's types -> how their tensors at a module are called, empty where there are none (``carried.json``).

    Read from PEFT 0.21. X-LoRA is not among them: its configuration names other adapters by their places on a machine.
    """
    found: Mapping[str, str] = json.loads((files("hubkit.artifact") / "carried.json").read_text("utf-8"))
    return found


def carried_type(method: str | None) -> str | None:
    """PEFT's type of a manifest's method; None for a method that is not only carried."""
    return method.removeprefix(MARK) if method is not None and method.startswith(MARK) else None


def modules_of(peft_type: str, keys: Collection[str], base: Collection[str], where: str) -> list[str]:
    """The modules of the base that an adapter acts at, found by the names of its tensors; sorted.

    Args:
        keys: names of its tensors.
        base: names of the base's modules.
        where: the file, for messages.

    Raises:
        HubkitError: ``HK-KEYS`` naming every tensor that is of no module of the base, and not of the type's own; or
            where there is none.
    """
    if not keys:
        raise HubkitError("HK-KEYS", "the file holds no tensor of an adapter", where=where)
    start = types().get(peft_type, "")
    at_module = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+?)\.{start}.+") if start else re.compile(r"(?!)")
    own = re.compile(rf"base_model\.{start}.+") if start else re.compile(r"(?!)")
    found: set[str] = set()
    homeless: list[str] = []
    for key in sorted(keys):
        held, _, last = key.removeprefix(PEFT_PREFIX).rpartition(".")
        match = at_module.fullmatch(key)
        module = match[1] if match else held if last in HELD and key.startswith(PEFT_PREFIX) else ""
        if module in base:
            found.add(module)
        elif module or not (key in _WHOLE or own.fullmatch(key)):
            homeless.append(key)
    if homeless:
        raise HubkitError(
            "HK-KEYS",
            f"{len(homeless)} tensors have no place in the base",
            where=where,
            have=homeless,
            want=f"{PEFT_PREFIX}<module>.{start}...",
            fix="--base with the base that the adapter was trained on",
        )
    return sorted(found)
