"""Whether a repository of a directory registry is whole: every document read, every object hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hubkit.errors import HubkitError
from hubkit.registry.directory.history import HEX40, History, forget
from hubkit.registry.directory.objects import CHUNK, HEX64, object_path, open_regular


@dataclass
class Proof:
    """What was found in one repository.

    Args:
        folder: of the repository.
        name: ``org/name``, for the lines about it.
        commits: how many were read.
        objects: how many were hashed.
        size: bytes of them.
        damaged: a line for each thing that is not as it should be.
    """

    folder: Path
    name: str
    commits: int = 0
    objects: int = 0
    size: int = 0
    damaged: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Read all of it."""
        forget()
        history = History(self.folder)
        with self._blaming("repo.json"):
            if not isinstance(json.loads((self.folder / "repo.json").read_bytes())["private"], bool):
                raise ValueError("it does not say whether it is private")
        with self._blaming("refs.json"):
            refs = json.loads((self.folder / "refs.json").read_bytes())
            for kind in ("branches", "tags"):
                for ref, commit in refs[kind].items():
                    if not history.has(commit):
                        self._say(f"refs.json: {kind} '{ref}' means {commit}, which is not there")
            if "main" not in refs["branches"]:
                self._say("refs.json: there is no branch 'main'")
        named: dict[str, int] = {}
        with self._blaming("commits"):
            for path in sorted((self.folder / "commits").iterdir()):
                if HEX40.fullmatch(path.name):
                    named |= self._commit(history, path.name)
        self._contents(named)

    def _commit(self, history: History, commit: str) -> dict[str, int]:
        """The objects that a commit names, with their sizes."""
        with self._blaming(f"commits/{commit}"):
            self.commits += 1
            for parent in history.read(commit).parents:
                if not history.has(parent):
                    self._say(f"commits/{commit}: its parent {parent} is not there")
            return {entry.sha256: entry.size for entry in history.tree(commit).values()}
        return {}

    def _contents(self, named: dict[str, int]) -> None:
        """Hash the objects that are named, and those that wait for a commit: another upload would take them over."""
        folder = self.folder / "objects"
        for sha256 in sorted({*named, *(path.name for path in folder.glob("??/*") if HEX64.fullmatch(path.name))}):
            path = object_path(folder, sha256)
            place = f"objects/{sha256[:2]}/{sha256}"
            with self._blaming(place):
                try:
                    found, size = _digest(path)
                except HubkitError as error:
                    if error.code == "HK-NOT-FOUND" and sha256 not in named:
                        continue  # collected meanwhile
                    raise
                self.objects, self.size = self.objects + 1, self.size + size
                if found != sha256:
                    self._say(f"{place}: its content is sha256:{found}")
                elif size != named.get(sha256, size):
                    self._say(f"{place}: it has {size} bytes, not {named[sha256]}")

    def _say(self, text: str) -> None:
        self.damaged.append(f"{self.name}: {text}")

    @contextmanager
    def _blaming(self, place: str) -> Iterator[None]:
        """What cannot be read is damaged, and the rest is read all the same."""
        try:
            yield
        except HubkitError as error:
            self._say(f"{place}: {error.what}" + (f" ({Path(error.where).name})" if error.where else ""))
        except OSError as error:
            file = f" ({Path(error.filename).name})" if isinstance(error.filename, str | Path) else ""
            self._say(f"{place}: {error.strerror or type(error).__name__}{file}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._say(f"{place}: the document is damaged")


def _digest(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as source:
        while data := source.read(CHUNK):
            digest.update(data)
            size += len(data)
    return digest.hexdigest(), size
