"""Heat maps of layers × modules as one HTML file: inline SVG and CSS, no script, nothing fetched, all text escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hubkit.errors import escape

_CELL, _LEFT, _TOP = 18, 46, 118
_ADVICE = ' class="advice"'
_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
table { border-collapse: collapse; margin: .6rem 0; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
.maps { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; overflow-x: auto; }
figcaption { font-size: .85rem; max-width: 22rem; } text { font: 10px system-ui, sans-serif; fill: currentColor; }
rect { stroke: var(--line); } .advice { border-left: 4px solid #c2410c; padding-left: .8rem; }
"""


@dataclass(frozen=True)
class HeatMap:
    """One figure per site.

    Args:
        title: what is shown.
        note: how to read it.
        values: site -> value; None where there is none.
        low: value of the palest cell; a `middle` makes it a scale with two ends.
        high: value of the strongest cell.
        middle: value of the palest cell of a scale with two ends.
    """

    title: str
    note: str
    values: Mapping[str, float | None]
    low: float = 0.0
    high: float = 1.0
    middle: float | None = None


@dataclass(frozen=True)
class Section:
    """A heading, sentences, a table of facts, and maps side by side."""

    title: str
    text: Sequence[str]
    facts: Sequence[tuple[str, str]] = ()
    maps: Sequence[HeatMap] = ()
    stress: bool = False


def page(title: str, sections: Iterable[Section]) -> bytes:
    """The bytes of the page; same sections, same bytes."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(title)}</h1>",
    ]
    for section in sections:
        parts += _section(section)
    return "\n".join([*parts, "</body></html>", ""]).encode()


def _section(section: Section) -> Iterator[str]:
    if section.title:
        yield f"<h2>{_text(section.title)}</h2>"
    for sentence in section.text:
        yield f"<p{_ADVICE if section.stress else ''}>{_text(sentence)}</p>"
    if section.facts:
        yield "<table>"
        yield from (f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in section.facts)
        yield "</table>"
    if section.maps:
        yield '<div class="maps">'
        for one in section.maps:
            yield from _figure(one)
        yield "</div>"


def _figure(one: HeatMap) -> Iterator[str]:
    places = {site: place(site) for site in one.values}
    layers = sorted({layer for layer, _ in places.values()})
    modules = list(dict.fromkeys(module for _, module in places.values()))
    width, height = _LEFT + _CELL * len(modules) + 70, _TOP + _CELL * len(layers) + 6
    yield f'<figure><svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    yield f"<title>{_text(one.title)}</title>"
    for column, module in enumerate(modules):
        x, y = _LEFT + _CELL * column + 12, _TOP - 6
        yield f'<text x="{x}" y="{y}" transform="rotate(-50 {x} {y})">{_text(_last(module))}</text>'
    for row, layer in enumerate(layers):
        label = "" if layer < 0 else str(layer)
        yield f'<text x="{_LEFT - 6}" y="{_TOP + _CELL * row + 13}" text-anchor="end">{label}</text>'
    for site, (layer, module) in places.items():
        x, y = _LEFT + _CELL * modules.index(module), _TOP + _CELL * layers.index(layer)
        value = one.values[site]
        said = "none" if value is None else f"{value:.3f}"
        yield (
            f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="{_colour(one, value)}">'
            f"<title>{_text(f'{site}: {said}')}</title></rect>"
        )
    yield f"</svg><figcaption><b>{_text(one.title)}</b> {_text(one.note)}</figcaption></figure>"


def place(site: str) -> tuple[int, str]:
    """The layer of a site, -1 outside all layers, and its name with that number left out.

    >>> place("model.layers.3.self_attn.q_proj")
    (3, 'model.layers.*.self_attn.q_proj')
    """
    found = re.search(r"(?<=\.)[0-9]{1,6}(?=\.)", site)
    return (int(found[0]), f"{site[: found.start()]}*{site[found.end() :]}") if found else (-1, site)


def _last(module: str) -> str:
    """The end of a module's name that still tells it from its siblings, for a narrow column."""
    tail = module.rpartition("*.")[2]
    short = ".".join(tail.split(".")[-2:])
    return short if len(short) <= 24 else short[:10] + "…" + short[-13:]


def _colour(one: HeatMap, value: float | None) -> str:
    """From white to red; on a scale with two ends the lower one is blue. Grey where there is no value."""
    if value is None:
        return "#8883"
    if one.middle is not None and value < one.middle:
        return _mixed((29, 78, 216), (one.middle - value) / (one.middle - one.low))
    start = one.low if one.middle is None else one.middle
    return _mixed((194, 65, 12), (value - start) / (one.high - start))


def _mixed(colour: tuple[int, int, int], part: float) -> str:
    part = min(1.0, max(0.0, part))
    return "#" + "".join(f"{round(255 + (channel - 255) * part):02x}" for channel in colour)


def _text(text: str) -> str:
    """Text of a stranger, safe in an element or attribute, control and bidirectional characters shown."""
    return html.escape(escape(text))
