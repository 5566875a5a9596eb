"""Terms of a sum or stack as people type them: ``1.0*./a + -0.5*org/b@v2``."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import MANIFEST_NAME, AdapterFolder, open_adapter, quantized_for
from hubkit.documents.mix import Tree, weights
from hubkit.errors import USAGE, HubkitError
from hubkit.named.members import open_mix, unused
from hubkit.named.sources import Source, adapter_source
from hubkit.registry.opening import Where
from hubkit.registry.reference import parse_reference

if TYPE_CHECKING:
    from torch import nn

    from hubkit.artifact.identity.digest import BaseRecord
    from hubkit.tensors.live.attached import Attached
    from hubkit.tensors.parts.mix import Mix

_WEIGHT = re.compile(r"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?")
Terms = Path | str | Sequence[Path | str] | Mapping[str, float] | Mapping[Path, float]
"""What `parse_terms` takes."""


@dataclass(frozen=True)
class Term:
    """One adapter or mix in a sum or stack.

    Args:
        name: unique among the terms; made from the reference.
        reference: as resolved: the folder, or the repository at its commit.
        weight: its factor.
        folder: the adapter, opened and checked.
        tree: of a mix: how its adapters act together, by their names.
        members: of a mix: those adapters.
    """

    name: str
    reference: str
    weight: float
    folder: AdapterFolder
    tree: Tree | None = None
    members: tuple[Term, ...] = ()


def parse_terms(terms: Terms) -> list[tuple[str, float]]:
    """(reference, weight) of each term, in order.

    Args:
        terms: a mapping reference -> weight; or text, in one piece or in several: ``1.0*./a + -0.5*./b``,
            ``./a - ./b``. The path of a folder may hold spaces where it is a piece, or a key, of its own; a `Path` is
            always one folder.

    Raises:
        HubkitError: ``HK-TERMS`` for text that is no such sum, and for weights that are no finite numbers.
    """
    if isinstance(terms, Mapping):
        found: list[tuple[str, object]] = [(as_text(reference), weight) for reference, weight in terms.items()]
    elif isinstance(terms, str | os.PathLike | Sequence) and not isinstance(terms, bytes):
        found = [*_scan([terms] if isinstance(terms, str | os.PathLike) else terms)]
    else:
        raise not_terms([repr(terms)[:80]])
    weights = [_number(weight) for _, weight in found]
    bad = [f"{weight}*{name}" for (name, weight), number in zip(found, weights, strict=True) if number is None]
    if bad or not found:
        raise not_terms(bad or ["nothing"])
    return [(name, number) for (name, _), number in zip(found, weights, strict=True) if number is not None]


def _scan(words: Sequence[Path | str]) -> list[tuple[str, str]]:
    """(reference, weight as text) of each term in the words of a command line."""
    found: list[tuple[str, str]] = []
    sign = ""
    for piece in (piece for word in words for piece in _pieces(word)):
        match = _WEIGHT.match(piece)
        assert match is not None
        name, own = piece[match.end() :], match["sign"]
        if not name and own and not match["weight"] and not sign:
            sign = own  # stands alone, before its term
            continue
        if not name or (sign == "-" and own):
            raise not_terms([piece])
        minus = "-" if "-" in (sign, own) else ""
        found.append((name, minus + (match["weight"] or "1")))
        sign = ""
    if sign:
        raise not_terms([sign])
    return found


def as_text(reference: object) -> str:
    """One reference as text."""
    if not isinstance(reference, str | os.PathLike):
        raise not_terms([repr(reference)])
    return reference if isinstance(reference, str) else str(parse_reference(Path(reference)))


def _pieces(word: Path | str) -> list[str]:
    if not isinstance(word, str):
        return [as_text(word)]
    match = _WEIGHT.match(word)
    assert match is not None
    if re.search(r"\s", word[match.end() :].strip()) and os.path.isdir(word[match.end() :]):
        return [word]
    return re.sub(r"\s*\*\s*", "*", word).split()


def _number(text: object) -> float | None:
    try:
        number = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def not_terms(have: list[str]) -> HubkitError:
    """The refusal of text that is no sum."""
    want = "[WEIGHT*]REFERENCE + ..., e.g. ./a + -0.5*./b"
    return HubkitError("HK-TERMS", "these are not terms of a sum", want=want, have=have, status=USAGE)


def open_terms(terms: Terms, where: Where, *, taken: Iterable[str] = ()) -> list[Term]:
    """The adapters of a sum or stack, pulled where needed, each opened and checked; of mixes all that is in them.

    Args:
        taken: names that are in use: no adapter gets one of them.

    Raises:
        HubkitError: ``HK-TERMS``, ``HK-REFERENCE``, ``HK-NOT-ADAPTER`` for a merged checkpoint, ``HK-MIX-MEMBER``; what
            pulling and opening raise.
    """
    found = ((adapter_source(reference, where), weight) for reference, weight in parse_terms(terms))
    return open_sources(found, where, taken=taken)


def open_sources(sources: Iterable[tuple[Source, float]], where: Where, *, taken: Iterable[str] = ()) -> list[Term]:
    """`open_terms` of adapters and mixes that lie in folders by now, each with its weight."""
    made: list[Term] = []
    used = set(taken)
    for source, weight in sources:
        folder = open_adapter(source.path)
        if folder.manifest.kind == "mix":
            origin = parse_reference(source.reference)
            found = open_mix(folder, origin, where, taken=used)
            inner = tuple(Term(one.name, one.reference, 1.0, one.folder) for one in found.adapters)
            name = unused(folder.manifest.name, {term.name for term in made})
            made.append(Term(name, source.reference, weight, folder, found.tree, inner))
        else:
            name = unused(require_adapter(folder).manifest.name, used)
            made.append(Term(name, source.reference, weight, folder))
        used |= {one.name for one in adapters(made[-1:])}
    return made


def adapters(terms: Iterable[Term]) -> list[Term]:
    """The terms that are adapters, and those in the mixes among them."""
    return [one for term in terms for one in ((term,) if term.tree is None else term.members)]


def as_sum(terms: Iterable[Term], operator: str = "sum") -> list[Term]:
    """The same sum as a sum of adapters alone: each with the product of the weights above it.

    Raises:
        HubkitError: ``HK-COMPOSE`` for a mix with a stack in it: what a member adds may depend on those below; and for
            any mix under an operator that would treat its adapters as if they had been named one by one.
    """
    from dataclasses import replace

    made: list[Term] = []
    for term in terms:
        stacked = term.tree is not None and "stack" in term.tree.kinds()
        if stacked or (term.tree is not None and operator != "sum"):
            why = "is a stack, which is no sum" if stacked else f"is several adapters, and {operator!r} is not linear"
            raise HubkitError(
                "HK-COMPOSE",
                f"the mix {term.name!r} {why}",
                where=term.reference,
                have=str(term.tree),
                fix="hubkit merge writes a mix into its base, hubkit generate runs it",
            )
        factors = {} if term.tree is None else weights(term.tree)
        made += [replace(one, weight=term.weight * factors.get(one.name, 1.0)) for one in adapters([term])]
    return made


def require_adapter(folder: AdapterFolder) -> AdapterFolder:
    """`folder` itself, unless it is a merged checkpoint or a mix: those have no tensors of an adapter.

    Raises:
        HubkitError: ``HK-NOT-ADAPTER``.
    """
    manifest = folder.manifest
    fixes = {
        "model": "a merged checkpoint is a base: name it with --base",
        "mix": "make one adapter of it: hubkit compose    or a checkpoint: hubkit merge",
    }
    if manifest.kind != "adapter":
        raise HubkitError(
            "HK-NOT-ADAPTER",
            f"{manifest.name!r} is a {manifest.kind}, not an adapter",
            where=f"{folder.path / MANIFEST_NAME}#/kind",
            want="adapter",
            have=manifest.kind,
            fix=fixes[manifest.kind],
        )
    return folder


def require_mix(kind: str) -> None:
    """Refuses a word that names no mix, before anything is fetched or read: ``HK-MIX``."""
    from hubkit.tensors.parts.mix import make_mix

    make_mix(kind, {"": 1.0})


def mix_of(terms: Iterable[Term], kind: str) -> Mix:
    """The terms as a ``sum`` or a ``stack``, mixes as the trees they are; one mix alone is its own tree.

    Raises:
        HubkitError: ``HK-MIX`` for another word.
    """
    from hubkit.tensors.parts.mix import from_tree, make_mix

    found = [(term.name if term.tree is None else from_tree(term.tree), term.weight) for term in terms]
    alone = found[0] if len(found) == 1 else None
    return make_mix(kind, found) if alone is None or isinstance(alone[0], str) or alone[1] != 1.0 else alone[0]


def attached(model: nn.Module, terms: Iterable[Term], kind: str) -> Attached:
    """`model`, a live base, with the adapters of `terms` attached and their mix active.

    Raises:
        HubkitError: as `mix_of`; what reading and attaching adapters raises.
    """
    from hubkit.methods.reading import read_adapter
    from hubkit.tensors.live.attached import Attached

    terms, made = list(terms), Attached(model)
    for term in adapters(terms):
        made.add(term.name, read_adapter(term.folder, made.sites, name=term.name, dtype="base"))
    made.set_mix(mix_of(terms, kind))
    return made


def codec_of_terms(terms: Iterable[Term]) -> str | None:
    """How the base is quantized for the terms that were trained so, and with them for all; None where it is not."""
    return quantized_for(term.folder for term in adapters(terms))[0]


def require_base(terms: Iterable[Term], record: BaseRecord, allow: bool) -> tuple[str, ...]:
    """Refuses terms that were trained on another base than `record`; returns the overrides that were needed.

    Raises:
        HubkitError: ``HK-BASE-MISMATCH``, ``HK-BASE-UNPROVEN``.
    """
    from hubkit.artifact.identity.base_match import proven, require_same_base

    used: list[str] = []
    for term in adapters(terms):
        manifest = term.folder.manifest
        assert manifest.base is not None  # an adapter without one does not open
        # equal digests of all weights leave no tensor to name
        listed = None if proven(manifest.base, record.fingerprint) else term.folder.base_tensors()
        have = record.fingerprint, listed, record.tensors
        used += require_same_base(term.name, term.reference, manifest.base, *have, allow)
    return tuple(dict.fromkeys(used))
