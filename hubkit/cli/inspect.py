"""``hubkit inspect``."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from hubkit.cli.group import declare
from hubkit.cli.output import emit, json_option, registry_option, table
from hubkit.documents.arguments import size
from hubkit.documents.mix import Tree
from hubkit.verbs.inspect import Inspected, inspect


@declare("inspect")
@click.argument("reference")
@registry_option
@json_option
def command(reference: str, registry: str | None) -> None:
    """Show what an adapter is: manifest, sizes, base, parents.

    REFERENCE is a folder or a repository; of a repository only the manifest and the header of the tensors are read.
    Nothing is proven by this: `hubkit verify` does that.

    Example:
      hubkit inspect ana/chat@v1.2.0
    """
    emit(inspect(reference, registry=registry), _render)


def _render(one: Inspected) -> str:
    manifest = one.manifest
    parts = [f"{manifest.name} {manifest.version}  ({one.reference})", "", table(_facts(one))]
    if manifest.config:
        rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in sorted(manifest.config.items())]
        parts += ["", table(rows, head=("OPTION", "VALUE"))]
    for title in ("training", "evaluation", "composition", "extraction", "rebase"):
        if said := getattr(manifest, title):
            rows = [(key, json.dumps(value, ensure_ascii=False)) for key, value in sorted(said.items())]
            parts += ["", table(rows, head=(title.upper(), ""))]
    if manifest.kind == "mix":
        mix = manifest.mixed()
        members = [(name, member.reference, member.digest) for name, member in mix.members.items()]
        parts += ["", *_drawn(mix.tree), "", table(members, head=("MEMBER", "FOUND AT", "DIGEST"))]
    elif manifest.parents:
        made = [(f"{one.weight:g}", one.reference, one.digest) for one in manifest.parents]
        parts += ["", table(made, head=("WEIGHT", "MADE FROM", "DIGEST"))]
    files = [(entry.path, size(entry.size), entry.sha256) for entry in manifest.files]
    return "\n".join([*parts, "", table(files, head=("FILE", "SIZE", "DIGEST"))] if files else parts)


def _drawn(tree: Tree, above: str = "") -> Iterator[str]:
    """The tree, one member a line: ``stack``, below it ``0.5 * sum``, below that its members."""
    if not above:
        yield tree.kind
    for number, (member, weight) in enumerate(tree.members, 1):
        last = number == len(tree.members)
        factor = "" if weight == 1.0 else f"{weight:g} * "
        yield f"{above}{'└─' if last else '├─'} {factor}{member if isinstance(member, str) else member.kind}"
        if isinstance(member, Tree):
            yield from _drawn(member, above + ("   " if last else "│  "))


def _facts(one: Inspected) -> list[tuple[str, str]]:
    manifest, base = one.manifest, one.manifest.base
    facts = [("digest", one.digest), ("kind", manifest.kind)]
    if manifest.method:
        plugin = f"  ({manifest.plugin.distribution} {manifest.plugin.version})" if manifest.plugin else ""
        facts.append(("method", manifest.method + plugin))
    if one.tensors:
        facts.append(("tensors", f"{one.tensors}, {one.parameters:,} parameters, {' '.join(one.dtypes)}"))
    facts.append(("size", size(one.size)))
    if base:
        facts.append(("base", (base.source or "a local folder") + (f"@{base.revision}" if base.revision else "")))
        facts.append(("weights", base.weights or "-"))
    if manifest.license:
        facts.append(("license", manifest.license))
    if manifest.overrides:
        facts.append(("overrides", ", ".join(manifest.overrides)))
    return facts
