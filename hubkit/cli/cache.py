"""``hubkit cache``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from hubkit.cli.group import declare
from hubkit.cli.list import brief
from hubkit.cli.output import dry_run_option, emit, json_option, table, terminal_width
from hubkit.documents.arguments import size
from hubkit.verbs.cache import ACTIONS, OLDER, Cached, Examined, Freed, cache


@declare("cache")
@click.argument("action", metavar="ACTION", type=click.Choice(ACTIONS))
@click.argument("reference", required=False)
@click.option("--older-than", metavar="SPAN", help=f"prune: what was not used for so long, {OLDER} (default), 2w, 12h.")
@click.option("--keep", metavar="LOCK", multiple=True, type=click.Path(path_type=Path),
              help="prune: keep what this lock names, too; several times.")  # fmt: skip
@click.option("--force", is_flag=True, help="remove: also what a lock needs.")
@dry_run_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    action: str,
    reference: str | None,
    older_than: str | None,
    keep: tuple[Path, ...],
    force: bool,
    dry_run: bool,
) -> None:
    """Look after the local store: what it holds and why, read it again, make room.

    ACTION is one of

    \b
      list    each artifact: its size, when it was pulled and used, which locks need it
      verify  read every byte again; exit status 1 says that something was damaged
      prune   remove what nobody used for a while, and what was left of broken downloads
      remove  take one artifact out: REFERENCE as list shows it, org/name, or a digest

    Locks and deployments that hubkit wrote or read on this machine keep what they name, as long as they are where they
    were. What verify finds damaged is put into quarantine, and fetched anew by the next command that names it. What was
    removed is fetched again when it is wanted.

    Example:
      hubkit cache list
      hubkit cache prune --older-than 30d --dry-run
      hubkit cache remove ana/chat
    """
    done: Any = cache(action, reference, older_than=older_than, keep=keep, force=force, dry_run=dry_run)
    render: Any = {"list": _listed, "verify": _examined}.get(action, _freed)
    emit(done, render)
    ctx.exit(1 if action == "verify" and any(one.damaged for one in done) else 0)


def _listed(found: Sequence[Cached]) -> str:
    rows = [(_brief(one, found), one.kind, size(one.size), one.pulled, one.used, _why(one)) for one in found]
    total = f"{len(found)} artifacts, {size(sum(one.size for one in found))}"
    head = ("REFERENCE", "KIND", "SIZE", "PULLED", "USED", "NEEDED BY")
    return f"{table(rows, head=head, width=terminal_width())}\n{total}" if rows else "the store is empty"


def _why(one: Cached) -> str:
    more = f" and {len(one.needed) - 1} more" if len(one.needed) > 1 else ""
    return f"{one.needed[0]}{more}" if one.needed else ""


def _brief(one: Cached, among: Sequence[Cached]) -> str:
    return brief(one.reference, [other.reference for other in among])


def _freed(done: Freed) -> str:
    would = "would be " if done.dry_run else ""
    rows = [("  - " + _brief(one, done.removed), one.kind, size(one.size), f"used {one.used}") for one in done.removed]
    lines = [table(rows)] if rows else []
    lines += [f"  - {size(done.leftovers)} of broken downloads and damaged files"] if done.leftovers else []
    count = f"{len(done.removed)} artifact{'' if len(done.removed) == 1 else 's'}"
    return "\n".join([*lines, f"{count} {would}removed, {size(done.size)} {would}free"])


def _examined(found: Sequence[Examined]) -> str:
    bad = [one for one in found if one.damaged]
    rows = [("damaged", one.reference, ", ".join(one.damaged)) for one in bad]
    total = size(sum(one.size for one in found))
    lines = [table(rows)] if rows else []
    return "\n".join([*lines, f"{len(found)} artifacts, {total} read again, {len(bad)} damaged"])
