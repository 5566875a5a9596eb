"""Whether adapters can act together as a tree says: found from their configurations, before any tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hubkit.artifact.folder import AdapterFolder
from hubkit.documents.mix import Tree, leaves
from hubkit.errors import HubkitError
from hubkit.methods.host import Method
from hubkit.methods.reading import method_of, recorded_base
from hubkit.tensors.parts.part import Edit

if TYPE_CHECKING:
    from hubkit.tensors.parts.part import Part


def require_mixable(tree: Tree, folders: Mapping[str, AdapterFolder]) -> None:
    """Refuses a tree that no model could run.

    Args:
        tree: of adapters alone.
        folders: name in the tree -> adapter; one that does not list its base's tensors is not judged.

    Raises:
        HubkitError: ``HK-MIX`` for a weight other than 1 where a part cannot be weighed; ``HK-NOT-MERGEABLE`` for a
            member of a stack that reads the weight above one that has no change of it; as `method_of`.
    """
    made = {name: _parts(folder) for name, folder in folders.items() if folder.base_tensors() is not None}
    fixed = {name for name, (_, parts) in made.items() if any(not part.weighable for part in parts.values())}
    weighed = [f"{weight:g}*{name}" for name, weight in leaves(tree) if name in fixed and weight != 1.0]
    if weighed:
        what = "virtual tokens cannot be weighted, and these members have such"
        raise HubkitError(
            "HK-MIX", what, want="weight 1", have=weighed, fix="give them the weight 1, or leave them out"
        )
    _require_folding(tree, made)


def _parts(folder: AdapterFolder) -> tuple[Method, Mapping[str, Part]]:
    import torch

    method, config = method_of(folder)
    with torch.device("meta"):
        return method, method.inject(recorded_base(folder), config)


def _require_folding(tree: Tree, made: Mapping[str, tuple[Method, Mapping[str, Part]]]) -> None:
    below: list[str] = []
    for member, _ in tree.members:
        here = [member] if isinstance(member, str) else [name for name, _ in leaves(member)]
        if isinstance(member, Tree):
            _require_folding(member, made)
        if tree.kind == "stack":
            _require_weights(here, below, made)
            below += here


def _require_weights(
    above: Iterable[str], below: Iterable[str], made: Mapping[str, tuple[Method, Mapping[str, Part]]]
) -> None:
    reads = {
        site: name
        for name in above
        for site, part in (made[name][1] if name in made else {}).items()
        if isinstance(part, Edit) and part.reads_weight
    }
    have = [
        f"{reads[site]} on {name} at {site}: {made[name][0].unmergeable}"
        for name in dict.fromkeys(below)
        if name in made and made[name][0].unmergeable
        for site in [next((site for site in made[name][1] if site in reads), None)]
        if site is not None
    ]
    if have:
        what = "a member of a stack reads the weight, which one below it cannot change"
        raise HubkitError("HK-NOT-MERGEABLE", what, have=have, fix="a sum, or another order")
