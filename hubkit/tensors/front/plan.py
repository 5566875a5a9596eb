"""Which virtual tokens a mix puts in front of the text, and what they depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from hubkit.errors import HubkitError
from hubkit.tensors.front.front import Front
from hubkit.tensors.lowrank.rows import Rows
from hubkit.tensors.parts import mix as mixes
from hubkit.tensors.parts.part import KV, Tokens

if TYPE_CHECKING:
    from hubkit.tensors.parts.adapter import Adapter
    from hubkit.tensors.parts.mix import Mix


@dataclass
class VirtualPlan:
    """The virtual tokens of one mix, in order.

    Args:
        parts: keys and values, or embeddings.
        sources: every parameter that the resulting keys and values depend on, beside the base's.
    """

    parts: Sequence[KV | Tokens]
    sources: Sequence[nn.Parameter]
    ready: tuple[Any, Front] | None = field(default=None, repr=False)
    last: Front | None = field(default=None, repr=False)

    @property
    def runs(self) -> bool:
        """Whether embeddings have to be run."""
        return any(isinstance(part, Tokens) for part in self.parts)


def plan_virtual(mix: Mix, adapters: Mapping[str, Adapter]) -> VirtualPlan | None:
    """What `mix` puts in front of the text: its members' virtual tokens, concatenated in order.

    Raises:
        HubkitError: ``HK-MIX`` for a weight other than 1: half a token is none.
    """
    found: list[KV | Tokens] = []
    for name, weight in mixes.leaves(mix):
        parts = adapters[name].virtual()
        if parts and weight != 1.0:
            raise HubkitError(
                "HK-MIX",
                f"virtual tokens cannot be weighted, and {name!r} consists of such",
                want="weight 1",
                have=str(weight),
                fix=f"give {name!r} the weight 1, or leave it out",
            )
        found += parts
    if not found:
        return None
    used = [part for name in mixes.names(mix) for part in adapters[name].parts.values()]
    owners = used if any(isinstance(part, Tokens) for part in found) else found
    return VirtualPlan(found, [parameter for part in owners for parameter in part.parameters()])


class RowsVirtual:
    """The virtual tokens of a batch whose rows have different mixes.

    Args:
        members: number of a mix -> its virtual tokens, and the plan under which embeddings are run.
        rows: which row has which mix.
    """

    def __init__(self, members: Mapping[int, tuple[VirtualPlan, Any]], rows: Rows) -> None:
        self.members, self.rows = members, rows
        self.sources = [source for plan, _ in members.values() for source in plan.sources]
        self.ready: tuple[Any, Front] | None = None
        self.last: Front | None = None


Virtual = VirtualPlan | RowsVirtual
