"""The keeper's half of a directory registry: what nobody needs is removed, what is there is proven."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from hubkit.errors import HubkitError
from hubkit.registry.directory.history import History
from hubkit.registry.directory.objects import object_path
from hubkit.registry.directory.proof import Proof
from hubkit.registry.directory.reading import DirectoryReader

GRACE = 48 * 3600.0
"""Seconds that content may wait for the commit that names it: an address for an upload is good for half of that."""


@dataclass(frozen=True)
class Collected:
    """What `DirectoryRegistry.collect` removed: objects and their bytes; and how many objects stay."""

    objects: int
    size: int
    kept: int


@dataclass(frozen=True)
class Checked:
    """What `DirectoryRegistry.check` read.

    Args:
        repositories: how many there are.
        commits: how many were read.
        objects: how many were hashed.
        size: bytes of them.
        damaged: a line for each thing that is missing or not what its name says.
    """

    repositories: int
    commits: int
    objects: int
    size: int
    damaged: tuple[str, ...]


@contextmanager
def suppress_gone() -> Iterator[None]:
    """A repository that was removed meanwhile needs no collecting."""
    try:
        yield
    except HubkitError as error:
        if error.code != "HK-NOT-FOUND":
            raise


class Keeper(DirectoryReader):
    """What a keeper does to a directory registry, beside its users."""

    def collect(self, older: float = GRACE) -> Collected:
        """Remove the objects that no commit names, in all repositories.

        Commits stay, those that no branch leads to as well: a lock may name them. Objects younger than `older` seconds
        may belong to a commit under way; one that is offered again counts as young.
        """
        counts = [0, 0, 0]
        for repo in self.repos():
            with suppress_gone(), self._writing(repo) as (folder, _):
                named = History(folder).objects()
                for path in sorted((folder / "objects").glob("??/*")):
                    info = path.lstat()
                    if path.name in named or time.time() - info.st_mtime < older:
                        counts[2] += 1
                        continue
                    path.unlink()
                    counts[0], counts[1] = counts[0] + 1, counts[1] + info.st_size
        return Collected(*counts)

    def discard(self, repo: str, young: Mapping[str, int]) -> None:
        """Remove objects that were put for a commit which was refused, unless a commit or another offer needs them.

        Args:
            young: sha256 -> modification time in nanoseconds that the object got when it came.
        """
        with suppress_gone(), self._writing(repo) as (folder, _):
            named = History(folder).objects()
            for sha256, came in young.items():
                path = object_path(folder / "objects", sha256)
                with suppress(FileNotFoundError):
                    if sha256 not in named and path.stat().st_mtime_ns == came:
                        path.unlink()

    def check(self) -> Checked:
        """Read every byte of the registry: documents, histories, objects, and whether each is what its name says.

        It changes nothing and needs no lock, so it runs beside users; what they remove meanwhile is no damage.
        """
        self.require_registry()
        repos = [path for path in sorted(self.root.glob("repos/*/*")) if path.is_dir()]
        found = [Proof(path, f"{path.parent.name}/{path.name}") for path in repos]
        for proof in found:
            proof.run()
        bad = tuple(line for proof in found if proof.folder.is_dir() for line in proof.damaged)
        return Checked(
            len(found), sum(one.commits for one in found), sum(one.objects for one in found),
            sum(one.size for one in found), bad,
        )  # fmt: skip
