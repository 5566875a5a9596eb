"""`mix`: write down how several adapters act together, as an artifact that can be verified, published and run.

It holds no tensors: a tree of sums and stacks, and of each member where it was found and the digest it must have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.artifact.folder import CARD_NAME, check_adapter, write_adapter
from hubkit.documents.arguments import checked
from hubkit.documents.licenses import require_license
from hubkit.documents.manifest import BaseFingerprint, Manifest, Parent
from hubkit.documents.mix import MixDocument, MixMember, NodeKind, Tree, leaves, replaced, require_small, weights
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.named.members import relative, unused
from hubkit.named.sources import chosen_name
from hubkit.named.terms import Term, Terms, adapters, open_terms, require_base, require_mix
from hubkit.named.trees import parse_tree
from hubkit.registry.api import Progress
from hubkit.registry.opening import Where
from hubkit.registry.reference import parse_reference

if TYPE_CHECKING:
    from hubkit.tensors.parts.mix import Mix


@dataclass(frozen=True, repr=False)
class Mixed(Shown):
    """A mix that was written.

    Args:
        path: its folder.
        digest: its identity; empty in a dry run.
        tree: how its members act together, by their names.
        members: name -> where it was found and its digest.
        overrides: named overrides used.
        dry_run: nothing was written.
    """

    path: Path
    digest: str
    tree: str
    members: Mapping[str, MixMember]
    overrides: tuple[str, ...]
    dry_run: bool


@checked
def mix(
    terms: Terms | Mix,
    out: Path | str,
    *,
    mix: NodeKind = "sum",
    name: str | None = None,
    license: str | None = None,
    registry: str | None = None,
    offline: bool = False,
    allow_base_mismatch: bool = False,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Mixed:
    """Writes a mix.

    Args:
        terms: ``"1.0*./a + -0.5*org/b"``, ``"stack(org/domain, 0.5*sum(./a, ./b))"``, a mapping reference -> weight, or
            a `Sum` or `Stack` of references. A member may be a mix itself. A repository is pinned to its commit; a
            folder is named relative to `out`.
        out: folder of the mix.
        mix: ``sum`` or ``stack``: how the outermost terms act together.
        name: its name; the folder's by default.
        license: SPDX identifier.
        allow_base_mismatch: mix adapters of different bases; recorded.
        replace: replace what hubkit wrote at `out`.
        dry_run: check everything, write nothing.

    Raises:
        HubkitError: ``HK-TERMS``, ``HK-MIX``, ``HK-NAME``, ``HK-BASE-MISMATCH``, ``HK-BASE-UNPROVEN``,
            ``HK-MIX-MEMBER``, ``HK-VOCABULARY``, ``HK-EXISTS``; what pulling and opening raise.
    """
    from hubkit.methods.mixable import require_mixable

    require_license(license)
    out, name = Path(out), chosen_name(name, Path(out))
    require_mix(mix)
    wanted = parse_tree(terms, mix)
    references = {reference: 1.0 for reference, _ in leaves(wanted)}
    members = open_terms(references, Where(registry, offline, progress))
    _require_apart(members, out)
    overrides = _one_base(members, allow_base_mismatch)
    document, whole = _document(wanted, dict(zip(references, members, strict=True)), out)
    require_mixable(whole, {one.name: one.folder for one in adapters(members)})
    manifest = Manifest(
        kind="mix",
        name=name,
        base=_base(members),
        vocabulary=_vocabulary(members),
        parents=_parents(document),
        mix=document.to_document(),
        license=license,
        overrides=overrides,
    )
    digest = _write(out, manifest, replace, dry_run)
    return Mixed(out, digest, str(document.tree), document.members, overrides, dry_run)


def _write(out: Path, manifest: Manifest, replace: bool, dry_run: bool) -> str:
    from hubkit.artifact.card import card_file

    files: dict[str, bytes | Path] = {CARD_NAME: card_file(manifest, ())}
    check_adapter(out, manifest, files, replace=replace)
    return "" if dry_run else write_adapter(out, manifest, files, replace=replace).digest


def _require_apart(members: list[Term], out: Path) -> None:
    """Refuses to write over a member, or inside of one: ``HK-EXISTS``."""
    target = Path(os.path.realpath(out))
    for one in [*members, *adapters(members)]:
        there = Path(os.path.realpath(one.folder.path))
        if there in (target, *target.parents) or target in there.parents:
            what = f"the mix would be in the place of its member {one.name!r}"
            raise HubkitError("HK-EXISTS", what, where=str(out), have=one.reference, fix="another --out")


def _document(wanted: Tree, members: Mapping[str, Term], out: Path) -> tuple[MixDocument, Tree]:
    """The tree by names, what was named twice being one member; and the tree of the adapters in all of them."""
    names: dict[str, str] = {}
    found: dict[str, MixMember] = {}
    for reference, one in members.items():
        digest = one.folder.manifest.digest
        same = next((name for name, known in found.items() if known.digest == digest), None)
        names[reference] = same or unused(one.folder.manifest.name, found)
        if same is None:
            parsed = parse_reference(one.reference)
            text = one.reference if parsed.path is None else relative(parsed.path, out)
            found[names[reference]] = MixMember(text, digest)
    tree = replaced(wanted, names)
    whole = replaced(wanted, {reference: one.tree or one.name for reference, one in members.items()})
    require_small(whole, str(out))
    return MixDocument(found, tree), whole


def _parents(document: MixDocument) -> tuple[Parent, ...]:
    """Every member with the sum of its weights."""
    found = document.members
    return tuple(
        Parent(found[name].reference, found[name].digest, weight) for name, weight in weights(document.tree).items()
    )


def _base(members: list[Term]) -> BaseFingerprint:
    """The base of all members: the first one's record of it."""
    base = members[0].folder.manifest.base
    assert base is not None  # neither an adapter nor a mix without one opens
    return base


def _one_base(members: list[Term], allow: bool) -> tuple[str, ...]:
    """All adapters belong to the base of the first.

    Raises:
        HubkitError: ``HK-BASE-MISMATCH``, ``HK-BASE-UNPROVEN``.
    """
    from hubkit.artifact.identity.digest import BaseRecord

    listed = adapters(members)[0].folder.base_tensors()
    return require_base(members, BaseRecord(_base(members), listed or ()), allow)


def _vocabulary(members: list[Term]) -> Mapping[str, object] | None:
    """The tokens that members add: the same ones, or only one member adds any.

    Raises:
        HubkitError: ``HK-VOCABULARY``.
    """
    adding = [one for one in members if one.folder.manifest.vocabulary]
    if any(one.folder.manifest.vocabulary != adding[0].folder.manifest.vocabulary for one in adding):
        what, have = "the members add different tokens to the vocabulary", [one.reference for one in adding]
        raise HubkitError("HK-VOCABULARY", what, have=have, fix="mix adapters that add the same tokens")
    return adding[0].folder.manifest.vocabulary if adding else None
