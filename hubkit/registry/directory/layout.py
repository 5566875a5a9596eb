"""Where a directory registry keeps what: paths, locks and checked documents below its root."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hubkit.documents.drafts import locked, scratch
from hubkit.documents.files import sync_folder
from hubkit.errors import HubkitError
from hubkit.registry.address import is_repo, require_repo
from hubkit.registry.directory.objects import publish

SCHEMA = "hubkit/registry/1"
MAX_MOVES = 10
_OWN = ("repos", "locks", "scratch", "moved", "lost+found")
"""What a registry may consist of before it is marked as one."""


class Layout:
    """Paths and locks of the registry at `root`; nothing is made before the first write."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self._checked = False

    @property
    def name(self) -> str:
        """The directory as a ``file://`` address."""
        return self.root.as_uri()

    def _path(self, repo: str) -> Path:
        require_repo(repo, self.name)
        return self.root.joinpath("repos", *repo.split("/"))

    def exists(self, repo: str) -> bool:
        """Whether there is a repository of this name."""
        path = self._path(repo) / "refs.json"
        with self._guard():
            try:
                return stat.S_ISREG(path.stat().st_mode)
            except (FileNotFoundError, NotADirectoryError):
                return False

    def moved(self, repo: str) -> str | None:
        """The name that a repository has now which was called `repo` once; None when there is none."""
        for _ in range(MAX_MOVES):
            try:
                repo = str(json.loads(self._move_marker(repo).read_bytes())["to"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
            if is_repo(repo) and self.exists(repo):
                return repo
        return None

    def _move_marker(self, repo: str) -> Path:
        self._path(repo)  # the name becomes a file name
        return self.root / "moved" / (repo.replace("/", "--") + ".json")

    def _folder(self, repo: str) -> Path:
        self._check_format()
        if not self.exists(repo):
            now = self.moved(repo)
            elsewhere = f"hubkit config set namespaces.{repo.partition('/')[0]} hf    or: hubkit push DIR {repo}"
            fix = f"it is called {now} now" if now else f"check the name; where it is on the Hub: {elsewhere}"
            raise HubkitError("HK-NOT-FOUND", f"no repository '{repo}'", where=self.name, fix=fix)
        path = self._path(repo)
        if path.is_symlink() or path.parent.is_symlink():
            raise HubkitError("HK-SYMLINK", "a repository must not be a link", where=str(path))
        return path

    def _document(self, repo: str, name: str) -> dict[str, Any]:
        path = self._folder(repo) / name
        with self._guard():
            raw = path.read_bytes()
        try:
            data = json.loads(raw)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise self._damaged(repo, name)
        return data

    def _damaged(self, repo: str, name: str) -> HubkitError:
        where = str(self._path(repo) / name)
        return HubkitError("HK-REGISTRY", "a document of the registry is damaged", where=where, fix="restore it")

    def _check_format(self) -> None:
        marker = self.root / "registry.json"
        with self._guard():
            if self._checked or not marker.exists():
                return
            raw = marker.read_bytes()
        try:
            found = json.loads(raw)["schema"]
        except (ValueError, KeyError, TypeError, RecursionError):
            found = "damaged"
        if found != SCHEMA:
            code = "HK-NEWER" if str(found).startswith("hubkit/registry/") else "HK-REGISTRY"
            raise HubkitError(
                code, "directory has another format", where=str(marker), want=SCHEMA, have=str(found)[:80]
            )
        self._checked = True

    def require_registry(self) -> None:
        """Refuses a directory that holds other things than a registry; an empty one may become one.

        Raises:
            HubkitError: HK-REGISTRY.
        """
        with self._guard():
            names = os.listdir(self.root) if self.root.is_dir() else []
            strange = [name for name in names if name not in _OWN and not name.startswith(".")]
            if strange and "registry.json" not in names:
                have, fix = ", ".join(sorted(strange)[:5]), "an empty directory, or one that holds a registry"
                what = "this directory holds other things than a registry"
                raise HubkitError("HK-REGISTRY", what, where=str(self.root), want="registry.json", have=have, fix=fix)
            self._check_format()

    def _begin(self) -> None:
        """Make the skeleton of a registry where there is none."""
        self.require_registry()
        with self._guard():
            for name in ("repos", "locks", "scratch"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            self._check_format()
            if not self._checked:
                with scratch(self.root / "scratch") as work:
                    publish(self.root / "registry.json", dump({"schema": SCHEMA}), work)
                sync_folder(self.root)

    @contextmanager
    def _locked(self, repo: str) -> Iterator[None]:
        self._path(repo)  # the name becomes a file name
        with locked(self.root / "locks" / (repo.replace("/", "--") + ".lock")):
            yield

    @contextmanager
    def _writing(self, repo: str) -> Iterator[tuple[Path, Path]]:
        """The repository's folder and a scratch folder, under its lock."""
        self._folder(repo)
        with self._guard(), self._locked(repo), scratch(self.root / "scratch") as work:
            yield self._folder(repo), work

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """What the file system refuses becomes a refusal in the user's words."""
        try:
            yield
        except FileNotFoundError as error:
            raise HubkitError("HK-NOT-FOUND", "gone from the registry", where=str(error.filename)) from None
        except PermissionError as error:
            raise HubkitError(
                "HK-FORBIDDEN", "the registry's directory may not be used", where=str(error.filename)
            ) from None
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "no space left for the registry" if full else "the registry's directory cannot be used"
            code = "HK-DISK" if full else "HK-IO"
            raise HubkitError(code, what, where=str(error.filename or self.root), have=error.strerror or "") from None


def dump(document: Mapping[str, Any]) -> bytes:
    """Readable JSON, the same bytes for the same content."""
    return (json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
