"""``hubkit search``."""

from __future__ import annotations

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, table, terminal_width
from hubkit.verbs.search import MOST, Found, search


@declare("search")
@click.argument("text", nargs=-1)
@click.option("--base", metavar="REF|DIGEST|DIR", help="Made on this base: org/name, its digest, or a base at hand.")
@click.option("--method", metavar="NAME", help="Made by this method.")
@click.option("--task", metavar="TASK", help="For this task, as model cards say it: text-generation.")
@click.option("--owner", metavar="NAME", help="In repositories of this owner.")
@click.option("--license", metavar="SPDX", help="Under this licence.")
@click.option("--local", is_flag=True, help="Search the local store, and ask no registry.")
@registry_option
@click.option("--limit", type=click.IntRange(1), default=MOST, show_default=True, help="Show so many at most.")
@json_option
def command(text: tuple[str, ...], registry: str | None, local: bool, limit: int, **wanted: str | None) -> None:
    """Find adapters by words, base, method, task, owner or licence.

    Where you get adapters from is searched: --registry, else $HUBKIT_REGISTRY, else the Hugging Face Hub; with --local
    what is stored on this machine. Whatever is given has to fit. TEXT are words in the name of the repository; in a
    directory and in the store also in those of adapter, method and base. A Hub is asked for adapters of hubkit's and of
    PEFT's; of the latter it knows neither method nor digest. With --base ./dir, or a base that is stored, its digest is
    looked for: what is found was made on these very weights, whatever they are called.

    Example:
      hubkit search chat --base org/base
      hubkit search --base ./base --local
    """
    emit(search(" ".join(text), registry=registry, local=local, limit=limit, **wanted), _render)


def _render(found: Found) -> str:
    if not found.hits:
        return f"nothing fits in {found.place}{_asked(found)}"
    rows = [
        (f"{hit.repo}{':' if hit.folder else ''}{hit.folder}", hit.version, hit.method, hit.base or hit.digest[:12])
        for hit in found.hits
    ]
    head = ("REPOSITORY", "VERSION", "METHOD", "BASE")
    more = "; there are more: --limit" if found.more else ""
    count = f"{len(found.hits)} found in {found.place}{more}"
    return f"{table(rows, head=head, width=terminal_width())}\n{count}"


def _asked(found: Found) -> str:
    """What was looked for, in the words of the command line."""
    wanted = vars(found.wanted)
    words = [" ".join(found.wanted.words)] if found.wanted.words else []
    words += [f"--base {wanted[name]}" for name in ("base", "digest") if wanted[name]]
    words += [f"--{name} {wanted[name]}" for name in ("method", "task", "owner", "license") if wanted[name]]
    return f": {' '.join(words)}" if words else ""
