"""Where what a command names is looked for: one value, made at the door of a verb and handed down whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubkit.registry.api import Progress
from hubkit.registry.opening import open_registry
from hubkit.registry.reference import Reference

if TYPE_CHECKING:
    from hubkit.registry.api import Registry


@dataclass(frozen=True)
class Where:
    """How references become folders.

    Args:
        registry: the one of references that name none; None: the default registry.
        offline: use only what was pulled before.
        progress: of every pull.
    """

    registry: str | None = None
    offline: bool = False
    progress: Progress | None = None

    def open(self, reference: Reference) -> Registry:
        """The registry that `reference` is in; see `open_registry`."""
        return open_registry(reference, self.registry)
