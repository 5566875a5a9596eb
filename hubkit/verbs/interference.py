"""The page of `hubkit compose --report`: what was measured between members, site by site, and what it advises.

One HTML file by itself: no script, nothing fetched, all text escaped; same figures, same bytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.documents.files import require_free, write
from hubkit.errors import escape

if TYPE_CHECKING:
    from hubkit.tensors.weights.interference import Interference, Pair

TITLE = "How these adapters get in each other's way"
COLUMNS = (
    ("overlap of columns", "what both can write: 0 disjoint, 1 the same", 0.0, 1.0),
    ("overlap of rows", "what both read: 0 disjoint, 1 the same", 0.0, 1.0),
    ("cosine", "blue: they undo each other; red: they repeat each other", 0.0, 1.0),
    ("sign conflict", "of the entries large in both; 0.5 is chance", 0.5, 0.5),
    ("relative norm", "log10 of second over first; blue: the first is larger", 0.0, 1.0),
)
"""Heading, how to read it, the value of a cell without colour, and how far from it the colour is full."""
CAUTION = (
    "These are rules of thumb; the first that holds decides. Figures are means over sites, weighted by the product of"
    " the two norms. They are computed from the weights alone and say nothing of any task: measure what matters to you"
    " before you ship."
)
RED, BLUE = "194 65 12", "29 78 216"
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
table { border-collapse: collapse; margin: .6rem 0; } td { font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid #8884; padding: .1rem .6rem; text-align: left; vertical-align: top; }
small { font-weight: normal; display: block; } .advice { border-left: 4px solid #c2410c; padding-left: .8rem; }
"""


def require_page(path: Path, replace: bool) -> Path:
    """`path`, where a page may be written; checked before any work is done.

    Raises:
        HubkitError: ``HK-EXISTS`` for a file that is there and not to be replaced; ``HK-IO`` where none can be.
    """
    return require_free(path, replace)


def write_page(path: Path, found: Interference) -> None:
    """Writes the page.

    Raises:
        HubkitError: ``HK-DISK``, ``HK-IO``.
    """
    write(path, ("\n".join(_page(found)) + "\n").encode())


def _page(found: Interference) -> Iterator[str]:
    from hubkit.tensors.weights import interference as rules

    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{TITLE}</title><style>{STYLE}</style></head><body><h1>{TITLE}</h1>"
    yield f'<p class="advice">{_text(found.advice)}: {_text(found.reason)}.</p><h2>Members and their weights</h2>'
    yield from _facts((name, f"{weight:+g}") for name, weight in found.members)
    for pair in found.pairs:
        yield from _pair(pair)
    yield "<h2>How the advice is found</h2>"
    yield f"<p>{CAUTION}</p>"
    shared = f"overlap of rows and of columns at least {rules.SHARED} and {rules.ABOVE_CHANCE:g} times chance"
    repeated = f"cosine at least {rules.REPEATED}, a sum overshoots"
    conflict = f"with a sign conflict of at least {rules.CONFLICT}"
    yield from _facts(
        [
            (rules.APART, f"cosine at or below {rules.OPPOSED}: a sum undoes both"),
            (rules.TIES, f"{repeated}; or {shared}, {conflict}"),
            (rules.SUM, "everything else"),
        ]
    )
    yield "</body></html>"


def _facts(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield "<table>"
    yield from (f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts)
    yield "</table>"


def _pair(pair: Pair) -> Iterator[str]:
    """The means, what chance would give, and a row for each site where both act."""
    first, second = pair.members
    yield f"<h2>{_text(first)} and {_text(second)}</h2><p>{_text(pair.advice)}: {_text(pair.reason)}.</p><table>"
    heads = "".join(f"<th>{name}<small>{note}</small></th>" for name, note, _, _ in COLUMNS)
    yield f"<tr><th>{len(pair.sites)} sites where both act</th>{heads}</tr>"
    columns, rows = pair.chance or (None, None)
    yield _row("mean", (pair.columns, pair.rows, pair.cosine, pair.conflict, _log(1.0, pair.ratio)))
    yield _row("chance", (columns, rows, 0.0, 0.5, None))
    for at in pair.sites:
        yield _row(at.site, (at.columns, at.rows, at.cosine, at.conflict, _log(*at.norms)))
    yield "</table>"


def _row(name: str, values: Sequence[float | None]) -> str:
    cells = (_cell(value, pale, span) for value, (_, _, pale, span) in zip(values, COLUMNS, strict=True))
    return f"<tr><th>{_text(name)}</th>{''.join(cells)}</tr>"


def _cell(value: float | None, pale: float, span: float) -> str:
    if value is None:
        return "<td>none</td>"
    part = max(-1.0, min(1.0, (value - pale) / span))
    return f'<td style="background: rgb({RED if part > 0 else BLUE} / {abs(part):.2f})">{value:.3f}</td>'


def _log(first: float, second: float | None) -> float | None:
    return math.log10(second / first) if second and first else None


def _text(text: str) -> str:
    """Text of a stranger, safe in an element, control and bidirectional characters shown."""
    return html.escape(escape(text))
