"""``hubkit list``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, short, table, terminal_width
from hubkit.documents.arguments import size
from hubkit.verbs.list import Listed
from hubkit.verbs.list import list as list_verb

_COMMIT = re.compile(r"@([0-9a-f]{40})(?![0-9a-f])")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@declare("list")
@click.argument("prefix", required=False, default="")
@click.option("--remote", is_flag=True, help="Ask the registry instead of the local store.")
@registry_option
@click.option("--base", metavar="DIR|REF", help="Say of each stored adapter whether it fits this base.")
@json_option
def command(prefix: str, remote: bool, registry: str | None, base: str | None) -> None:
    """List what the local store or a registry holds.

    PREFIX narrows it: an organisation, or the beginning of a repository's name. --registry implies --remote. An adapter
    fits a base when it was made on the same weights, by their digest; a mix fits when all its adapters do.

    Example:
      hubkit list
      hubkit list --base ./base
      hubkit list --remote ana/
    """
    found = list_verb(prefix, remote=remote, registry=registry, base=base)
    if base is not None:
        emit(found, _fitting)
    else:
        emit(found, _remote if remote or registry else _stored)


def _stored(found: tuple[Listed, ...]) -> str:
    return _table(found, ())


def _fitting(found: tuple[Listed, ...]) -> str:
    return _table(found, [_said(one) for one in found])


def _said(one: Listed) -> str:
    if one.fits is None:
        return "" if one.kind == "base" else "not known"
    return "yes" if one.fits else "no"


def _table(found: tuple[Listed, ...], fits: Sequence[str]) -> str:
    """The rows, on a terminal no wider than it is."""
    every, rows = [one.reference for one in found], []
    for at, one in enumerate(found):
        facts = one.kind or "", size(one.size or 0), one.pulled or "", *fits[at : at + 1]
        rows.append((brief(one.reference, every), *facts, _known(one)))
    head = ("REFERENCE", "KIND", "SIZE", "PULLED", *(["FITS"] if fits else []), "KNOWN AS")
    return table(rows, head=head, width=terminal_width()) if rows else "the store is empty"


def brief(reference: str, among: Iterable[str]) -> str:
    """A reference with twelve digits of its commit, and without its registry where all are from one; --json has all.

    Args:
        among: all references that are shown.
    """
    places = {_COMMIT.split(one)[0].rpartition("/")[0].rpartition("/")[0] for one in among if "/" in one}
    if not _COMMIT.search(reference):
        return reference[:19] if _DIGEST.fullmatch(reference) else reference
    name, commit, rest = _COMMIT.split(reference)
    return f"{name if len(places) > 1 else '/'.join(name.split('/')[-2:])}@{commit[:12]}{rest}"


def _known(one: Listed) -> str:
    """Its names, but for the commit, which stands in the reference."""
    return ", ".join(name for name in one.versions if f"@{name}" not in one.reference) or short(one.digest)


def _remote(found: tuple[Listed, ...]) -> str:
    rows = [(one.reference, ", ".join(one.versions)) for one in found]
    return table(rows, head=("REPOSITORY", "VERSIONS")) if rows else "no repositories"
