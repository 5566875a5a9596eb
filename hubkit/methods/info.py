"""What a method says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hubkit.artifact.adapterhub import AdapterHubForm
from hubkit.artifact.forms import PeftForm
from hubkit.errors import HubkitError

if TYPE_CHECKING:
    from hubkit.tensors.base.site import Site
    from hubkit.tensors.parts.tied import Tied


@dataclass(frozen=True)
class MethodInfo:
    """A method's description; it touches no model.

    Args:
        name: the name of its entry point.
        summary: one line.
        config: a frozen dataclass, the method's configuration; a docstring or comment per field is its documentation.
        paper: where the formulas come from.
        identity: a fresh adapter changes nothing.
        unmergeable: why it cannot be merged into a weight; empty when it can.
        peft: how PEFT writes it, or None when PEFT does not know it.
        recipe: training defaults that the paper or measurements found to matter (``learning_rate``, ...).
        sources: where the recipe's values come from.
        kinds: kinds of sites it can act at.
        low_rank: (targets, rank) -> the configuration under which the part at a site is exactly B·A with scale 1, for a
            method whose parts can hold any low-rank change: what `hubkit compose` writes sums with.
        whole: (names of tensors, ``<site>.weight`` and ``<site>.bias``; whether a tied output head follows its table)
            -> the configuration under which parts with these roles hold exactly what is added to these tensors: what
            `hubkit compose` writes any other change with.
        learning_rates: (config, site, role) -> what multiplies the learning rate there; 1 everywhere if not given.
        narrow: (config, names ``<site>.<role>`` that are not zero) -> the configuration that makes these alone, for a
            method whose adapters leave tensors out that training did not change.
        adapterhub: how AdapterHub writes it, or None when hubkit does not read and write that.
    """

    name: str
    summary: str
    config: type[Any]
    paper: str
    identity: bool = True
    unmergeable: str = ""
    peft: PeftForm | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    sources: str = ""
    kinds: tuple[str, ...] = ("linear",)
    low_rank: Callable[[tuple[str, ...], int], Any] | None = None
    whole: Callable[[tuple[str, ...], Tied], Any] | None = None
    learning_rates: Callable[[Any, Site, str], float] | None = None
    narrow: Callable[[Any, frozenset[str]], Any] | None = None
    adapterhub: AdapterHubForm | None = None


class NotMergeable(HubkitError):
    """Raised by a method whose change of this weight cannot be written as an addition to it.

    Args:
        reason: one sentence, shown to the user.
    """

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(
            "HK-NOT-MERGEABLE",
            reason,
            where=where,
            fix="keep the adapter beside its base: hubkit generate, hubkit deploy",
        )
