"""The probes of an adapter, ``probes.json``: what its base says with it, at several scales, on a few prompts.

A server that answers these prompts tells by its log-probabilities whether it applies the adapter, and how strongly.
Written as canonical JSON of at most 64 KiB; its digest is among those of the manifest's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubkit.documents.files import read
from hubkit.documents.schema import canonical, check, parse, refuse_secrets
from hubkit.errors import HubkitError

PROBES_NAME = "probes.json"
SCHEMA = "hubkit/probes/1"
MAX_BYTES = 64 << 10
Row = tuple[float, ...]


@dataclass(frozen=True)
class Prompt:
    """One prompt, and what may come next.

    Args:
        text: the prompt.
        ids: the same as the base's tokenizer reads it, special tokens included.
        tokens: ids of next tokens, ascending.
        logprobs: scale -> log-probability of each of these tokens; as many rows as there are scales.
        null: the same with a null adapter: its values in random order.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[Row, ...]
    null: Row


@dataclass(frozen=True)
class Probes:
    """``probes.json``; see the descriptions in ``schemas/probes-1.json``.

    Args:
        scales: by what the adapter was weighed, ascending, 0 and 1 among them.
        likeliest: how many of the likeliest tokens of each scale are among a prompt's tokens.
        prompts: the prompts, each at every scale.
        made: versions of the libraries that computed it.
    """

    scales: tuple[float, ...]
    likeliest: int
    prompts: tuple[Prompt, ...]
    made: Mapping[str, str] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """The JSON object."""
        prompts = [
            {
                "text": one.text,
                "ids": list(one.ids),
                "tokens": list(one.tokens),
                "logprobs": [list(row) for row in one.logprobs],
                "null": list(one.null),
            }
            for one in self.prompts
        ]
        own = {"scales": list(self.scales), "likeliest": self.likeliest, "prompts": prompts, "made": dict(self.made)}
        return {"schema": SCHEMA, **own}

    def to_bytes(self) -> bytes:
        """The bytes of ``probes.json``, canonical JSON.

        Raises:
            HubkitError: ``HK-PROBES`` for more than 64 KiB, ``HK-SECRET`` for a prompt that holds a token of access.
        """
        document = self.to_document()
        refuse_secrets(document, "list of probes")
        data = canonical(document)
        if len(data) > MAX_BYTES:
            raise HubkitError(
                "HK-PROBES",
                "the probes are too large to go with an adapter",
                want=f"at most {MAX_BYTES} bytes",
                have=f"{len(data)} bytes for {len(self.prompts)} prompts",
                fix="fewer or shorter prompts",
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes, where: str = PROBES_NAME) -> Probes:
        """Read the bytes of a ``probes.json``.

        Raises:
            HubkitError: ``HK-JSON``, ``HK-SCHEMA``, ``HK-NEWER``.
        """
        document = parse(data, where)
        check(document, "probes", where)
        made = cls(
            scales=tuple(map(float, document["scales"])),
            likeliest=document["likeliest"],
            prompts=tuple(_prompt(one) for one in document["prompts"]),
            made=document["made"],
        )
        faults = list(_faults(made))
        if faults:
            raise HubkitError("HK-SCHEMA", "the probes are not valid", where=where, have=faults)
        return made

    @classmethod
    def read(cls, path: Path) -> Probes:
        """Read a file of probes; `path` is the file or the folder it is in.

        Raises:
            HubkitError: as ``from_bytes``; ``HK-MISSING``, ``HK-IO``.
        """
        path = path / PROBES_NAME if path.is_dir() else path
        try:
            data = read(path, MAX_BYTES)
        except FileNotFoundError:
            fix = "hubkit pack DIR --probes makes them"
            raise HubkitError("HK-MISSING", "there are no probes", where=str(path), fix=fix) from None
        return cls.from_bytes(data, str(path))


def _prompt(document: Mapping[str, Any]) -> Prompt:
    return Prompt(
        text=document["text"],
        ids=tuple(document["ids"]),
        tokens=tuple(document["tokens"]),
        logprobs=tuple(tuple(map(float, row)) for row in document["logprobs"]),
        null=tuple(map(float, document["null"])),
    )


def _faults(probes: Probes) -> list[str]:
    """What a schema cannot say."""
    found = []
    if list(probes.scales) != sorted(probes.scales) or not {0.0, 1.0} <= {*probes.scales}:
        found.append("#/scales: not ascending, or without 0 and 1")
    for number, one in enumerate(probes.prompts):
        rows = [*one.logprobs, one.null]
        if len(one.logprobs) != len(probes.scales):
            found.append(f"#/prompts/{number}/logprobs: {len(one.logprobs)} rows for {len(probes.scales)} scales")
        if any(len(row) != len(one.tokens) for row in rows):
            found.append(f"#/prompts/{number}: rows of other lengths than {len(one.tokens)} tokens")
    return found
