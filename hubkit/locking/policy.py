"""A recipe's policy held against what is about to be pinned: allowed licences, required probes."""

from __future__ import annotations

from collections.abc import Iterator

from hubkit.documents.manifest import Manifest
from hubkit.documents.recipe import Policy
from hubkit.errors import HubkitError
from hubkit.named.members import member_reference, stored_manifest
from hubkit.named.sources import read_manifest
from hubkit.registry.opening import Where
from hubkit.registry.reference import Reference

PROBES_NAME = "probes.json"


def violations(policy: Policy, name: str, manifest: Manifest, reference: Reference, where: Where) -> list[str]:
    """Why a policy does not allow an adapter, or a mix with what is in it; a line each, by name.

    Args:
        name: in the recipe.
        reference: where the manifest was read; the members of a mix are looked for from there.

    Raises:
        HubkitError: what reading the manifests of a mix's members raises.
    """
    if not policy.to_document():
        return []
    found = []
    for label, one in _adapters(name, manifest, reference, where):
        if policy.licenses and not (one.license and _allowed(one.license, policy.licenses)):
            said = f"its licence is {one.license}" if one.license else "it names no licence"
            found.append(f"{label}: {said}")
        if policy.require_probes and not (one.probes or PROBES_NAME in {file.path for file in one.files}):
            found.append(f"{label}: it carries no probes")
    return found


def license_of(manifest: Manifest, reference: Reference, where: Where) -> str | None:
    """The licence of an adapter; of a mix those of all that is in it, each once, joined by AND."""
    found = {one.license for _, one in _adapters("", manifest, reference, where) if one.license}
    return " AND ".join(sorted(found)) or None


def refused(policy: Policy, where: str, found: list[str]) -> HubkitError:
    """The refusal of adapters that a policy does not allow."""
    want = [f"licenses: {', '.join(policy.licenses)}"] if policy.licenses else []
    want += ["require-probes: true"] if policy.require_probes else []
    what, fix = "the recipe's policy does not allow what it names", "other adapters, or another [policy]"
    return HubkitError("HK-POLICY", what, where=f"{where}  policy", want=want, have=found, fix=fix)


def _adapters(
    label: str, manifest: Manifest, reference: Reference, where: Where, depth: int = 0
) -> Iterator[tuple[str, Manifest]]:
    """The adapter itself; or those of a mix, mixes inside it resolved."""
    if manifest.kind != "mix" or depth > 16:
        yield label, manifest
        return
    for name, member in manifest.mixed(str(reference)).members.items():
        origin = member_reference(reference, member.reference)
        inner = stored_manifest(member.digest) or read_manifest(origin, where)
        yield from _adapters(f"{label}/{name}", inner, origin, where, depth + 1)


def _allowed(expression: str, licenses: tuple[str, ...]) -> bool:
    """Whether an SPDX expression can be met by allowed licences alone: any side of OR, both sides of AND."""
    known = {one.casefold() for one in licenses}
    text = expression.casefold().strip()
    if text in known or "(" in text:
        return text in known
    return any(all(one.strip() in known for one in side.split(" and ")) for side in text.split(" or "))
