"""The page of `hubkit compose --report`: what was measured between members, and what it advises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.heatmap import HeatMap, Section, page
from hubkit.documents.files import write
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from hubkit.tensors.weights.interference import Interference, Pair


def require_page(path: Path, replace: bool) -> Path:
    """`path`, where a page may be written; checked before any work is done.

    Raises:
        HubkitError: ``HK-EXISTS`` for a file that is there and not to be replaced; ``HK-IO`` where none can be.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise HubkitError(
            "HK-IO", "no file can be written here", where=str(path), want="a file in a folder that exists"
        )
    if path.exists() and not replace:
        raise HubkitError(
            "HK-EXISTS", f"{path.name!r} exists already", where=str(path), fix="another name, or --replace"
        )
    return path


def write_page(path: Path, found: Interference) -> None:
    """Writes the page as one self-contained HTML file.

    Raises:
        HubkitError: ``HK-DISK``, ``HK-IO``.
    """
    write(path, page("How these adapters get in each other's way", _sections(found)))


def _sections(found: Interference) -> Iterator[Section]:
    from hubkit.tensors.weights import interference as rules

    weights = [(name, f"{weight:+g}") for name, weight in found.members]
    advice = f"{found.advice}: {found.reason}."
    yield Section("", [advice[0].upper() + advice[1:]], stress=True)
    yield Section("Members and their weights", (), weights)
    for pair in found.pairs:
        yield _pair(pair)
    yield Section(
        "How the advice is found",
        [
            "These are rules of thumb; the first that holds decides. "
            "Figures are means over sites, weighted by the product of the two norms. They are computed from the "
            "weights alone and say nothing of any task: measure what matters to you before you ship.",
        ],
        [
            (rules.APART, f"cosine at or below {rules.OPPOSED}: a sum undoes both"),
            (
                rules.TIES,
                f"cosine at least {rules.REPEATED}, a sum overshoots; or overlap of rows and of columns at least "
                f"{rules.SHARED} and {rules.ABOVE_CHANCE:g} times chance, with a sign conflict of at least "
                f"{rules.CONFLICT}",
            ),
            (rules.SUM, "everything else"),
        ],
    )


def _pair(pair: Pair) -> Section:
    first, second = pair.members
    chance = pair.chance or (None, None)
    facts = [
        ("advice", f"{pair.advice}: {pair.reason}"),
        ("overlap of columns", f"{_figure(pair.columns)} (chance {_figure(chance[0])})"),
        ("overlap of rows", f"{_figure(pair.rows)} (chance {_figure(chance[1])})"),
        ("cosine", _figure(pair.cosine)),
        ("sign conflict", f"{_figure(pair.conflict)} (chance 0.500)"),
        ("norm of the second over the first", _figure(pair.ratio)),
        ("sites where both act", str(len(pair.sites))),
    ]
    ratios = {at.site: math.log10(at.norms[1] / at.norms[0]) if min(at.norms) > 0 else None for at in pair.sites}
    maps = [
        HeatMap("Overlap of columns", "what both can write: 0 disjoint, 1 the same", _of(pair, "columns")),
        HeatMap("Overlap of rows", "what both read: 0 disjoint, 1 the same", _of(pair, "rows")),
        HeatMap("Cosine", "blue: they undo each other; red: they repeat each other", _of(pair, "cosine"), -1, 1, 0),
        HeatMap("Sign conflict", "of the entries large in both; 0.5 is chance", _of(pair, "conflict"), 0, 1, 0.5),
        HeatMap("Relative norm", "log10 of second over first: blue, the first is larger", ratios, -1, 1, 0),
    ]
    return Section(f"{first} and {second}", (), facts, maps if pair.sites else ())


def _of(pair: Pair, name: str) -> dict[str, float | None]:
    return {at.site: getattr(at, name) for at in pair.sites}


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
