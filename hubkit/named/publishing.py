"""One commit on what a repository holds: looked at, changed on the tip that was seen, and read again afterwards; and
what of a base's folder is published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hubkit.artifact.folder import CARD_NAME, PEFT_CONFIG
from hubkit.artifact.identity.digest import hash_file
from hubkit.documents.files import read, refusing, require_unlinked
from hubkit.documents.manifest import MANIFEST_NAME, FileEntry, Manifest
from hubkit.documents.names import check_allowed
from hubkit.documents.schema import sha256
from hubkit.errors import HubkitError
from hubkit.registry.api import Refs, Registry, RemoteFile

ATTEMPTS = 3
"""How often changes are computed anew after somebody else's commit came first."""

WEIGHTS = (".safetensors", ".safetensors.index.json")

T = TypeVar("T")


def retrying(attempt: Callable[[], T]) -> T:
    """What `attempt` gives, which is begun anew when somebody committed between its look and its commit.

    Raises:
        HubkitError: ``HK-STALE`` when others keep committing; everything else at once.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return attempt()
        except HubkitError as fault:
            if fault.code != "HK-STALE":
                raise
    return attempt()


class Publication:
    """A repository as it is now, to be changed by one commit.

    Args:
        place: the registry.
        repo: ``org/name``; it need not be there.
    """

    def __init__(self, place: Registry, repo: str) -> None:
        self.place, self.repo = place, repo
        self.where = f"{place.name}/{repo}"
        self.look()

    def look(self) -> None:
        """Ask for its branches, tags and files."""
        self.exists, self.refs = True, Refs()
        try:
            self.refs = self.place.refs(self.repo)
        except HubkitError as error:
            if error.code != "HK-NOT-FOUND":
                raise
            self.exists = False
        self.tip = self.refs.branches.get("main")
        self.files = {f.path: f for f in self.place.files(self.repo, self.tip)} if self.tip else {}

    def create(self, private: bool) -> None:
        """Make it where it is not there, and look again."""
        if not self.exists:
            self.place.create(self.repo, private=private)
            self.look()

    def lacking(self, content: Mapping[str, Path]) -> dict[str, Path | bytes]:
        """Those files of `content` that the tip does not have with these bytes."""
        return {path: source for path, source in content.items() if not self._holds(path, source)}

    def leftovers(self, content: Mapping[str, Path], *, weights: bool = False) -> tuple[str, ...]:
        """Files of the version before that `content` no longer has; what others put beside them stays.

        Args:
            weights: also weights at the top that no manifest lists: a base has no manifest, and stale shards spoil it.
        """
        ours = {path for path in self.files if weights and "/" not in path and path.endswith(WEIGHTS)}
        if self.tip is not None and MANIFEST_NAME in self.files:
            try:
                before = Manifest.from_bytes(self.place.read(self.repo, self.tip, MANIFEST_NAME), self.where)
                ours |= {entry.path for entry in before.files}
            except HubkitError as error:
                if error.code not in ("HK-JSON", "HK-SCHEMA", "HK-NOT-CANONICAL"):
                    raise
        return tuple(sorted((ours & self.files.keys()) - content.keys() - {CARD_NAME}))

    def commit(
        self, add: Mapping[str, Path | bytes], removed: Iterable[str], message: str, content: Mapping[str, Path]
    ) -> str:
        """One commit on the tip; afterwards every file of `content` is there with its bytes.

        Raises:
            HubkitError: ``HK-STALE``; ``HK-FILES`` where a server lost or changed bytes; what the registry raises.
        """
        commit = self.place.commit(self.repo, add, removed, message=message, parent=self.tip)
        if wrong := self.differing(content, commit):
            what, fix = "the registry does not hold what was sent", "push again; the version is not tagged"
            raise HubkitError("HK-FILES", what, where=f"{self.where}@{commit[:12]}", have=wrong, fix=fix)
        return commit

    def differing(self, content: Mapping[str, Path], commit: str) -> list[str]:
        """Those files of `content` that a commit does not have with these bytes, in words."""
        there = {file.path: file for file in self.place.files(self.repo, commit)}
        return [
            f"{path}: {'missing' if path not in there else 'other bytes'}"
            for path, source in content.items()
            if path not in there
            or there[path].size != source.stat().st_size
            or self._digest_of(there[path], commit) != hash_file(source)
        ]

    def _holds(self, path: str, source: Path) -> bool:
        """Whether the tip already has these bytes at `path`."""
        there = self.files.get(path)
        if there is None or there.size != source.stat().st_size:
            return False
        return self._digest_of(there, self.tip or "") == hash_file(source)

    def _digest_of(self, file: RemoteFile, commit: str) -> str:
        """As listed; a Hub lists no sha256 for small files, which are then read."""
        return file.sha256 or sha256(self.place.read(self.repo, commit, file.path))


@dataclass(frozen=True)
class BaseContent:
    """What of a base's folder is published: what a pull would take, and the model card.

    Args:
        folder: it.
        files: path in the repository to the file.
        left_out: other files of the folder.
    """

    folder: Path
    files: Mapping[str, Path]
    left_out: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of the list of its files, as the store has it."""
        from hubkit.registry.store.store import digest_files

        return digest_files(FileEntry(name, one.stat().st_size, hash_file(one)) for name, one in self.files.items())


def is_base(folder: Path) -> bool:
    """Whether a folder holds a whole model and no adapter."""
    return (folder / "config.json").is_file() and not any(
        (folder / name).is_file() for name in (MANIFEST_NAME, PEFT_CONFIG)
    )


def base_content(folder: Path) -> BaseContent:
    """The files of a base, judged before anything is sent: names, kinds, headers of weights against their index.

    Raises:
        HubkitError: ``HK-NOT-MODEL``, ``HK-BASE-FILES``, ``HK-FILES``, ``HK-PICKLE``, ``HK-SAFETENSORS``,
            ``HK-SYMLINK``, ``HK-FORBIDDEN-FILE``, ``HK-NAME``, ``HK-JSON``, ``HK-IO``.
    """
    from hubkit.artifact.identity.base_files import local, weight_headers
    from hubkit.registry.store.selection import MAX_DOCUMENT, select_base

    with refusing(folder):
        names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        listing = [RemoteFile(name, (folder / name).stat().st_size) for name in names]
    chosen = select_base(listing, None, lambda file: read(folder / file.path, MAX_DOCUMENT), str(folder)).files
    files = {name: folder / name for name in names if name in chosen or name == CARD_NAME}
    require_unlinked(folder, files, cached=True)
    weight_headers(local(folder))
    for name, path in files.items():
        with refusing(path), path.open("rb") as file:
            check_allowed(name, file.read(512), str(folder))
    return BaseContent(folder, files, tuple(name for name in names if name not in files))
