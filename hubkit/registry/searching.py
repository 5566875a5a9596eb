"""What a search asks for, what it finds, and how both are read from what lies in a repository."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

DIGITS = 16
"""Hexadecimal digits of a base's digest by which it is looked for, at least."""
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", re.MULTILINE | re.DOTALL)
_LINE = r"^{}:[ \t]*['\"]?([^'\"#\r\n]+)"
_LONGEST = 200


@dataclass(frozen=True)
class Hit:
    """One adapter, mix or merged model that was found.

    Args:
        repo: ``org/name``.
        folder: inside the repository, "" for its top.
        commit: 40 hexadecimal digits; "" where a server's list does not say.
        registry: its name.
        kind: ``adapter``, ``mix``, ``model``; "" where a server's list does not say.
        name: its own, from its manifest.
        version: from its manifest.
        method: from its manifest, or what another tool's configuration calls it.
        base: the repository of its base.
        digest: of its base's weights, or the beginning of it.
        task: what its model card says that it is for.
        license: SPDX expression.
        artifact: the digest of its manifest; of a stored one without manifest, that of its files; "" where not known.
    """

    repo: str
    folder: str = ""
    commit: str = ""
    registry: str = ""
    kind: str = ""
    name: str = ""
    version: str = ""
    method: str = ""
    base: str = ""
    digest: str = ""
    task: str = ""
    license: str = ""
    artifact: str = ""

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Hit:
        """What `to_row` gave.

        Raises:
            TypeError: for a row of another length.
        """
        return cls(*map(str, row))

    def to_row(self) -> list[str]:
        """Its fields in order."""
        return list(astuple(self))


COLUMNS = len(fields(Hit))
_AT = {item.name: number for number, item in enumerate(fields(Hit))}


@dataclass(frozen=True)
class Wanted:
    """What is searched for: whatever is given has to fit.

    Args:
        words: each stands somewhere in the repository's name, the adapter's, the method's or the base's.
        base: repository of the base.
        digest: of the base's weights, 16 hexadecimal digits or more.
        method, task, license: whole, whatever the case of their letters.
        owner: of the repository.
    """

    words: tuple[str, ...] = ()
    base: str = ""
    digest: str = ""
    method: str = ""
    task: str = ""
    license: str = ""
    owner: str = ""

    def fits(self, row: Sequence[str]) -> bool:
        """Whether a row of a `Hit` is wanted."""
        if self.owner and row[0].partition("/")[0].casefold() != self.owner.casefold():
            return False
        for name in ("base", "method", "task", "license"):
            given = getattr(self, name)
            if given and row[_AT[name]].casefold() != given.casefold():
                return False
        have = row[_AT["digest"]]
        if self.digest and (len(have) < DIGITS or not (have.startswith(self.digest) or self.digest.startswith(have))):
            return False
        if not self.words:
            return True
        text = " ".join([row[0], row[1], *(row[_AT[name]] for name in ("name", "method", "base"))]).casefold()
        return all(word in text for word in self.words)


def described(manifest: bytes | None, peft: bytes | None, card: bytes | None) -> dict[str, str]:
    """The fields of a `Hit` that the files of an adapter say, read without being held against a schema.

    Args:
        manifest: its ``hubkit.json``.
        peft: its ``adapter_config.json``.
        card: its ``README.md``, or the beginning of it.
    """
    said, other, front = _object(manifest), _object(peft), _front(card)
    recorded = said.get("base")
    base = recorded if isinstance(recorded, dict) else {}
    made = {"kind": said.get("kind") or "adapter", "name": said.get("name"), "version": said.get("version")}
    made["method"] = said.get("method") or str(other.get("peft_type") or "").lower()
    made["base"] = base.get("source") or other.get("base_model_name_or_path") or front.get("base_model")
    made["digest"] = str(base.get("weights") or "").removeprefix("sha256:")
    made |= {"task": front.get("pipeline_tag"), "license": said.get("license") or front.get("license")}
    return {name: value[:_LONGEST] for name, value in made.items() if isinstance(value, str)}


def _object(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _front(card: bytes | None) -> dict[str, str]:
    """The keys of a card's front matter that a search looks at, where they stand on a line of their own."""
    head = _FRONT.match((card or b"").decode("utf-8", "replace"))
    names = ("base_model", "pipeline_tag", "license") if head else ()
    lines = ((name, re.search(_LINE.format(name), head[1], re.MULTILINE)) for name in names if head)
    return {name: line[1].strip() for name, line in lines if line}
