"""Commits of a directory registry: small documents named by their own hash, a tree document each.

A commit's id is the first 40 hex digits of the sha256 of its bytes. There is no clock in it: the same content on the
same parent with the same message and author is the same commit. When it was made is the file's modification time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hubkit.errors import HubkitError
from hubkit.registry.directory.objects import HEX64, Entry, publish

HEX40 = re.compile(r"[0-9a-f]{40}")
MAX_DOCUMENT = 64 << 20
FileTree = dict[str, Entry]


@dataclass(frozen=True)
class Commit:
    """One commit.

    Args:
        id: 40 hex digits.
        parents: ids; empty for the first.
        tree: sha256 (64 hex) of the tree document.
        message: title, then optionally an empty line and more.
        author: user name, "" when unknown.
        time: seconds since 1970 when it was stored, informative.
    """

    id: str
    parents: tuple[str, ...]
    tree: str
    message: str
    author: str
    time: float = 0.0

    @property
    def title(self) -> str:
        """First line of the message."""
        return self.message.split("\n", 1)[0]


class History:
    """The commits and trees below one repository's folder."""

    def __init__(self, folder: Path) -> None:
        self._commits = folder / "commits"
        self._trees = folder / "trees"

    @staticmethod
    def prepare(folder: Path) -> None:
        """Make the two folders a `History` needs."""
        (folder / "commits").mkdir()
        (folder / "trees").mkdir()

    def add(self, tree: Mapping[str, Entry], parents: tuple[str, ...], message: str, author: str, work: Path) -> str:
        """Write a commit and its tree; its id. It is not on any branch yet."""
        listing = _dump({"files": {p: [e.size, e.sha256, e.oid, e.large] for p, e in tree.items()}})
        tree_id = hashlib.sha256(listing).hexdigest()
        self._put(self._trees / tree_id, listing, work)
        body = _dump({"author": author, "message": message, "parents": list(parents), "tree": tree_id})
        commit = hashlib.sha256(body).hexdigest()[:40]
        self._put(self._commits / commit, body, work)
        return commit

    def has(self, commit: str) -> bool:
        """Whether this 40-hex id is a commit here."""
        return HEX40.fullmatch(commit) is not None and (self._commits / commit).is_file()

    def find(self, prefix: str) -> str | None:
        """The only commit whose id starts with `prefix` (5 hex digits or more); None when there are none or several."""
        if not re.fullmatch(r"[0-9a-f]{5,40}", prefix):
            return None
        found = [p.name for p in self._commits.glob(f"{prefix}*") if HEX40.fullmatch(p.name)]
        return found[0] if len(found) == 1 else None

    def read(self, commit: str) -> Commit:
        """A commit by its full id; HK-NOT-FOUND, or HK-REGISTRY when its document is damaged."""
        if not HEX40.fullmatch(commit):
            raise HubkitError("HK-NOT-FOUND", "not a commit id", have=commit[:80], want="40 hex digits")
        path = self._commits / commit
        raw = _load(path)
        try:
            data = json.loads(raw)
            parents, tree = tuple(data["parents"]), data["tree"]
            sound = hashlib.sha256(raw).hexdigest()[:40] == commit and bool(HEX64.fullmatch(tree))
            sound = sound and all(HEX40.fullmatch(p) for p in parents)
            made = Commit(commit, parents, tree, str(data["message"]), str(data["author"]), path.stat().st_mtime)
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise _damaged(path)
        return made

    def tree(self, commit: str) -> FileTree:
        """All files of a commit, sorted by path."""
        path = self._trees / self.read(commit).tree
        try:
            state = path.stat()
        except FileNotFoundError:
            raise _damaged(path) from None
        return dict(_tree(path, state.st_mtime_ns, state.st_size))

    def objects(self) -> set[str]:
        """The sha256 of everything that any commit names, whether a branch leads to it or not.

        Raises:
            HubkitError: HK-REGISTRY for a damaged document: what it named is not known.
        """
        named: set[str] = set()
        for tree in {self.read(path.name).tree for path in self._commits.iterdir() if HEX40.fullmatch(path.name)}:
            path = self._trees / tree
            if not path.is_file():
                raise _damaged(path)
            state = path.stat()
            named |= {entry.sha256 for entry in _tree(path, state.st_mtime_ns, state.st_size).values()}
        return named

    def log(self, commit: str) -> list[Commit]:
        """A commit and its ancestors, newest first, along the first parents."""
        out = [self.read(commit)]
        while out[-1].parents:
            out.append(self.read(out[-1].parents[0]))
        return out

    def _put(self, path: Path, data: bytes, work: Path) -> None:
        if not path.exists():
            publish(path, data, work)


@lru_cache(maxsize=32)
def _tree(path: Path, mtime_ns: int, size: int) -> FileTree:
    """A tree document; never changes, so it is parsed once (time and size are there to notice damage)."""
    raw = _load(path)
    try:
        files = json.loads(raw)["files"]
        tree = {p: Entry(int(f[0]), str(f[1]), str(f[2]), bool(f[3])) for p, f in sorted(files.items())}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise _damaged(path) from None
    hashed = hashlib.sha256(raw).hexdigest() == path.name
    if not hashed or not all(HEX64.fullmatch(e.sha256) and HEX40.fullmatch(e.oid) for e in tree.values()):
        raise _damaged(path)
    return tree


def forget() -> None:
    """Read trees anew from now on: whoever looks for damage must not be told what was there before."""
    _tree.cache_clear()


def _dump(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def _load(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_DOCUMENT:
            raise _damaged(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise HubkitError("HK-NOT-FOUND", "no such commit", where=path.name) from None


def _damaged(path: Path) -> HubkitError:
    return HubkitError(
        "HK-REGISTRY", "a document of the registry is damaged", where=str(path), fix="restore it from a backup"
    )
