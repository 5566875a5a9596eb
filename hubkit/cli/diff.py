"""``hubkit diff``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, short, table, terminal_width
from hubkit.cli.progress import ProgressBar
from hubkit.verbs.diff import Difference, Differing, diff

SHOWN = 20
"""Tensors and sites that people are shown."""


@declare("diff")
@click.argument("first")
@click.argument("second")
@click.option("--base", metavar="DIR|REF", help="Their base, for methods whose change depends on its weights.")
@registry_option
@click.option("--offline", is_flag=True, help="Use only what was pulled before.")
@click.option("--exit-code", is_flag=True, help="Exit status 1 where they differ.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    first: str,
    second: str,
    base: str | None,
    registry: str | None,
    offline: bool,
    exit_code: bool,
) -> None:
    """Show what two adapters differ in.

    FIRST and SECOND are folders or repositories. Fields of the manifests, configuration and tensors are compared, and
    site by site what each adds to the base: the norm of its delta, the norm of the difference, and the cosine of the
    two. Where that makes no sense the reason is said. Exit status 0, whether they differ or not, unless --exit-code.

    Example:
      hubkit diff ana/chat@1.0.0 ana/chat@1.1.0
      hubkit diff ./chat ana/chat --exit-code
    """
    with ProgressBar("pull") as work:
        found = diff(first, second, base=base, registry=registry, offline=offline, progress=work.reach)
    emit(found, _render)
    ctx.exit(1 if exit_code and not found.same else 0)


def _render(found: Difference) -> str:
    head = [f"first   {found.first}", f"second  {found.second}"]
    if found.same:
        return "\n".join([*head, f"the same: {short(found.digests[0])}"])
    parts = ["\n".join(head)]
    for title, rows in (("MANIFEST", found.fields), ("CONFIGURATION", found.config)):
        parts += [_values(title, rows)] if rows else []
    parts += [_changed("files", found.files)] if found.files else []
    parts += [_changed("tensors", found.tensors)] if found.tensors else []
    return "\n\n".join([*parts, _sites(found)])


def _values(title: str, rows: Iterable[Differing]) -> str:
    cells = [(one.name, value_text(one.first), value_text(one.second)) for one in rows]
    return table(cells, head=(title, "FIRST", "SECOND"), width=terminal_width())


def value_text(value: Any) -> str:
    """A value of a manifest in few characters; ``-`` for none."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.removeprefix("sha256:")[:12] if text.startswith("sha256:") else text[:60]


def _changed(what: str, rows: tuple[Differing, ...]) -> str:
    """Each with what happened to it, the first of many."""
    lines = []
    for one in rows[:SHOWN]:
        state = (
            "in the second alone" if one.first is None else "in the first alone" if one.second is None else "changed"
        )
        lines.append((one.name, state))
    more = [f"and {len(rows) - SHOWN} more {what}: --json has all"] if len(rows) > SHOWN else []
    return "\n".join([table(lines, head=(what.upper(), ""), width=terminal_width()), *more])


def _sites(found: Difference) -> str:
    """The sites that differ most, and all of them together."""
    notes = [f"note: {note}" for note in found.notes]
    if found.left_out:
        return "\n".join([*notes, f"not compared site by site: {found.left_out}"])
    most = sorted(found.sites, key=lambda one: one.difference, reverse=True)[:SHOWN]
    rows = [
        (one.site, *(f"{value:.3g}" for value in (*one.norms, one.difference)), _figure(one.cosine)) for one in most
    ]
    head = ("SITE", "|FIRST|", "|SECOND|", "|DIFFERENCE|", "COSINE")
    more = [f"and {len(found.sites) - SHOWN} more sites, which differ less: --json has all"]
    whole = f"relative difference {_figure(found.relative)} at {len(found.sites)} sites"
    body = table(rows, head=head, width=terminal_width())
    return "\n".join([body, *(more if len(found.sites) > SHOWN else []), *notes, whole])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
