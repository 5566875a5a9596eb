"""The one protocol of a registry: a place where repositories of adapters and models live, each a history of commits.

Three implementations: the Hugging Face Hub and any server that speaks its protocol (`huggingface`), and a
directory (`directory`). Everything above this layer knows only `Registry`; one contract suite runs on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

Arrived = Callable[[int], None]
"""Called with the number of bytes that arrived since the last call: of one file."""
Progress = Callable[[int, int], None]
"""Called with the bytes that have arrived and the bytes in all: of a whole pull. From several threads, but never at the
same time."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit as the registry lists it, before anything of it is read.

    Args:
        path: relative, ``/`` between segments, as stored.
        size: bytes.
        sha256: ``sha256:<64 hex>`` where the registry knows it (large files of a Hub, all files of a directory).
    """

    path: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Refs:
    """The names of a repository's commits: branch and tag name to 40-hex commit."""

    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CommitInfo:
    """What a registry tells of one commit.

    Args:
        commit: 40 hexadecimal digits.
        title: first line of its message.
        date: when it was made, as ISO 8601 in UTC; "" where the registry does not say.
        author: "" where the registry does not say.
    """

    commit: str
    title: str
    date: str
    author: str


class Readable(Protocol):
    """What files can be fetched from: a registry, or a bundle of some of its repositories."""

    @property
    def name(self) -> str:
        """What messages and the store call this registry: an address without credentials."""
        ...

    def files(self, repo: str, commit: str) -> tuple[RemoteFile, ...]:
        """All files of a commit, sorted by path; folders are not listed."""
        ...

    def read(self, repo: str, commit: str, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``[start, stop)`` of a file, clipped at its end; the whole file by default."""
        ...

    def download(
        self,
        repo: str,
        commit: str,
        path: str,
        dest: Path,
        progress: Arrived | None = None,
        *,
        resume: bool = False,
    ) -> str:
        """Write a whole file to `dest`, streamed; ``sha256:...`` of its bytes. On any error no file is left at `dest`.

        Args:
            progress: called with the bytes of the file as they come, and with a negative number when it begins anew.
            resume: what is at `dest` is the file's beginning; after an error it stays there, with what arrived.
        """
        ...


@runtime_checkable
class Registry(Readable, Protocol):
    """Where repositories live. `repo` is ``org/name``; `commit` a full 40-hex commit id; paths use ``/``.

    Every method raises `HubkitError`: ``HK-NOT-FOUND`` (no such repository, revision or file),
    ``HK-AUTH`` (who are you), ``HK-FORBIDDEN`` (you may not), ``HK-OFFLINE`` (the registry does not answer).
    """

    def resolve(self, repo: str, revision: str | None) -> str:
        """The 40-hex commit that a branch, tag or (abbreviated) commit means; None is the default branch."""
        ...

    def create(self, repo: str, *, private: bool = False) -> bool:
        """Make a repository; True when it was made, False when it was already there.

        A fresh one has a branch ``main`` with one first commit, so that `resolve` answers at once.
        """
        ...

    def commit(
        self,
        repo: str,
        add: Mapping[str, Path | bytes],
        delete: Iterable[str],
        *,
        message: str,
        parent: str | None,
        branch: str = "main",
    ) -> str:
        """One atomic commit on `branch`; the new 40-hex id.

        Args:
            add: path in the repository to the file or bytes that become its content.
            delete: paths to remove; one that is absent is HK-NOT-FOUND.
            message: title, then optionally an empty line and a description.
            parent: the commit the caller saw at the tip; None means whatever the tip is now.

        Raises:
            HubkitError: HK-STALE when the tip is no longer `parent`; nothing is written then.
        """
        ...

    def refs(self, repo: str) -> Refs:
        """Branches and tags of a repository."""
        ...

    def log(self, repo: str, commit: str) -> tuple[CommitInfo, ...]:
        """A commit and those before it, newest first, along the first parents."""
        ...

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Give `commit` a tag; the same tag at the same commit is no error, at another one HK-VERSION-EXISTS."""
        ...

    def repos(self, prefix: str | None = None) -> tuple[str, ...]:
        """Sorted names of the repositories the caller may see: all, those of ``org``, or those starting ``org/na``."""
        ...
