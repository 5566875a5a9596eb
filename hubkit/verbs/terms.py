"""Terms of a sum or stack as people type them: ``1.0*./a + -0.5*org/b@v2``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubkit.artifact.folder import AdapterFolder, open_adapter
from hubkit.errors import USAGE, HubkitError
from hubkit.tensors.mix import Mix, make_mix
from hubkit.verbs.sources import Progress, adapter_source

if TYPE_CHECKING:
    from hubkit.artifact.digest import BaseRecord

_TERM = re.compile(r"(?:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<reference>\S+)")
Terms = str | Sequence[str] | Mapping[str, float]


@dataclass(frozen=True)
class Term:
    """One adapter in a sum or stack.

    Args:
        name: unique among the terms; made from the reference.
        reference: as resolved: the folder, or the repository at its commit.
        weight: its factor.
        folder: the adapter, opened and checked.
    """

    name: str
    reference: str
    weight: float
    folder: AdapterFolder


def parse_terms(terms: Terms) -> list[tuple[str, float]]:
    """(reference, weight) of each term, in order.

    Args:
        terms: a mapping reference -> weight; or text, in one piece or in several: ``1.0*./a + -0.5*./b``.

    Raises:
        HubkitError: ``HK-TERMS`` for text that is no such sum.
    """
    if isinstance(terms, Mapping):
        return [(reference, float(weight)) for reference, weight in terms.items()]
    words = terms if isinstance(terms, str) else " ".join(terms)
    text = re.sub(r"\s*\*\s*", "*", words.strip())
    pieces = [piece for piece in re.split(r"\s+\+\s+|\s+(?=-\s*[\d.])|\s+", text) if piece and piece != "+"]
    found = [(piece, _TERM.fullmatch(piece)) for piece in pieces]
    bad = [piece for piece, match in found if match is None]
    if bad or not found:
        raise HubkitError(
            "HK-TERMS", "these are not terms of a sum", want="[WEIGHT*]REFERENCE + ..., e.g. ./a + -0.5*./b",
            have=bad or "nothing", status=USAGE,
        )  # fmt: skip
    return [(match["reference"], float(match["weight"] or 1.0)) for _, match in found if match]


def open_terms(
    terms: Terms, *, registry: str | None = None, offline: bool = False, progress: Progress | None = None
) -> list[Term]:
    """The adapters of a sum or stack, pulled where needed, each opened and checked.

    Raises:
        HubkitError: ``HK-TERMS``, ``HK-REFERENCE``, what pulling and opening raise.
    """
    made: list[Term] = []
    for reference, weight in parse_terms(terms):
        source = adapter_source(reference, registry=registry, offline=offline, progress=progress)
        folder = open_adapter(source.path)
        taken = {term.name for term in made}
        name = folder.manifest.name
        number = 2
        while name in taken:
            name, number = f"{folder.manifest.name}-{number}", number + 1
        made.append(Term(name, source.reference, weight, folder))
    return made


def mix_of(terms: Iterable[Term], kind: str) -> Mix:
    """The terms as a ``sum`` or a ``stack``.

    Raises:
        HubkitError: ``HK-MIX`` for another word.
    """
    return make_mix(kind, [(term.name, term.weight) for term in terms])


def require_base(terms: Iterable[Term], record: BaseRecord, allow: bool) -> tuple[str, ...]:
    """Refuses terms that were trained on another base than `record`; returns the overrides that were needed.

    Raises:
        HubkitError: ``HK-BASE-MISMATCH``, ``HK-BASE-UNPROVEN``.
    """
    from hubkit.artifact.base_match import require_same_base

    used: list[str] = []
    for term in terms:
        manifest = term.folder.manifest
        if manifest.base is None:
            raise HubkitError(
                "HK-BASE-UNPROVEN", f"adapter {term.name!r} names no base", where=term.reference,
                fix=f"hubkit pack {term.folder.path} --base BASE", status=3,
            )  # fmt: skip
        have = record.fingerprint, term.folder.base_tensors(), record.tensors
        used += require_same_base(term.name, term.reference, manifest.base, *have, allow)
    return tuple(dict.fromkeys(used))
