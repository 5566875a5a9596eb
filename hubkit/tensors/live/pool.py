"""Adapters that are read when a mix first names them, and given up, least recently used first, when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from hubkit.errors import HubkitError
from hubkit.tensors.parts.adapter import Adapter

Load = Callable[[], Adapter]


@dataclass
class Pool:
    """What can be read, what has been, and how much of it may stay.

    Args:
        budget: bytes that the adapters read from here may take together; None: as many as are named.
    """

    budget: int | None = None
    _offers: dict[str, Load] = field(default_factory=dict)
    _held: dict[str, int] = field(default_factory=dict)
    """Name -> bytes, least recently used first."""

    def offer(self, name: str, load: Load) -> None:
        """`load` makes the adapter `name` when it is needed, as often as it is needed."""
        self._offers[name] = load

    def withdraw(self, name: str) -> None:
        """Forgets `name`, whether it has been read or not."""
        self._offers.pop(name, None)
        self._held.pop(name, None)

    @property
    def names(self) -> list[str]:
        return list(self._offers)

    def read(
        self, named: Iterable[str], attached: Mapping[str, Adapter], pinned: Iterable[str]
    ) -> tuple[dict[str, Adapter], list[str]]:
        """What has to come and go so that all of `named` are there; nothing is changed before `settle`.

        Args:
            attached: those that are there.
            pinned: names that must stay, too.

        Returns:
            the adapters to add, and the names to remove.

        Raises:
            HubkitError: ``HK-MEMORY`` when those that are needed at once exceed the budget; what loading raises.
        """
        needed = [name for name in dict.fromkeys(named) if name in self._offers]
        come = {name: self._offers[name]() for name in needed if name not in attached}
        sizes = {**self._held, **{name: bytes_of(adapter) for name, adapter in come.items()}}
        kept = {*needed, *pinned}
        least = sum(size for name, size in sizes.items() if name in kept)
        if self.budget is not None and least > self.budget:
            raise HubkitError(
                "HK-MEMORY",
                "the adapters that one call needs exceed the memory set for adapters",
                want=f"at most {self.budget} bytes",
                have=f"{least} bytes for {', '.join(sorted(kept & set(sizes)))}",
                fix="a larger budget, or fewer adapters at once",
            )
        go: list[str] = []
        total = sum(sizes.values())
        for name in self._held:
            if self.budget is None or total <= self.budget:
                break
            if name not in kept:
                go.append(name)
                total -= sizes[name]
        return come, go

    def settle(self, named: Iterable[str], attached: Mapping[str, Adapter]) -> None:
        """Notes what is there now, and that `named` were used last."""
        held = {name: size for name, size in self._held.items() if name in attached}
        for name in named:
            if name in self._offers:
                held[name] = held.pop(name, 0) or bytes_of(attached[name])
        self._held = held


def bytes_of(adapter: Adapter) -> int:
    """Bytes of its tensors in memory."""
    return sum(parameter.nbytes for parameter in adapter.parameters().values())
