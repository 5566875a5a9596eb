"""How much may be stored, by namespace and in all: asked before an upload begins, held while it runs, asked at the end.

What counts is what lies in the objects of the registry, that of commits and that which waits for one; `serve --gc`
frees the latter, deleting a repository frees both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hubkit.documents.arguments import size
from hubkit.errors import HubkitError
from hubkit.registry.directory.usage import Usage


@dataclass(frozen=True)
class Limit:
    """One quota as it stands: whose it is, the bytes it allows, and those that are used."""

    whose: str
    most: int
    used: int


class Quotas:
    """Says no before a disk does.

    Args:
        usage: what is stored.
        total: bytes that the whole registry may hold; None: as much as there is.
        named: gives the quotas of namespaces as they are now.
    """

    def __init__(self, usage: Usage, total: int | None, named: Callable[[], Mapping[str, int]]) -> None:
        self.usage, self._total, self._named = usage, total, named
        self._asking = threading.Lock()
        """Held while it is found out whether something fits, which may take a moment."""
        self._lock = threading.Lock()
        """Held to look at what is under way, which takes none."""
        self._under_way: list[tuple[str, int]] = []

    def limits(self, namespace: str | None = None) -> list[Limit]:
        """Those that there are; of a namespace only its own, beside that of the whole."""
        named = self._named()
        wanted = named if namespace is None else {namespace} & set(named)
        found = [Limit(f"namespace {name}", named[name], self.usage.of(name)) for name in sorted(wanted)]
        if self._total is not None:
            found.append(Limit("this server", self._total, sum(self.usage.all().values())))
        return found

    def require(self, repo: str, more: int) -> None:
        """Refuses `more` bytes for a repository where they do not fit beside what is stored and under way.

        Raises:
            HubkitError: HK-QUOTA.
        """
        with self._asking:
            self._require(repo.split("/")[0], more)

    def hold(self, repo: str, size: int) -> tuple[str, int]:
        """Take room for an upload that begins; nobody else gets it until `release`, which wants what this gives.

        Raises:
            HubkitError: HK-QUOTA.
        """
        mine = (repo.split("/")[0], size)
        with self._asking:
            self._require(*mine)
            with self._lock:
                self._under_way.append(mine)
        return mine

    def release(self, mine: tuple[str, int]) -> None:
        """The upload is over, whether it is stored now or not."""
        with self._lock:
            self._under_way.remove(mine)

    @contextmanager
    def holding(self, repo: str, size: int) -> Iterator[None]:
        """`hold` for as long as the block runs."""
        mine = self.hold(repo, size)
        try:
            yield
        finally:
            self.release(mine)

    def _require(self, namespace: str, more: int) -> None:
        with self._lock:  # before what is stored is counted: what ends meanwhile counts twice, not never
            under_way = list(self._under_way)
        for limit in self.limits(namespace):
            mine = limit.whose != "this server"
            waiting = sum(size for name, size in under_way if name == namespace or not mine)
            if limit.used + waiting + more > limit.most:
                what = f"the quota of {limit.whose} is {size(limit.most)}, {size(limit.used + waiting)} are used"
                have = f"{size(more)} more do not fit" if more else ""
                raise HubkitError("HK-QUOTA", what, have=have)
