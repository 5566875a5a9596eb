"""The reading half of a directory registry; needs no lock, for what it reads is written once or replaced whole."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from hubkit.errors import HubkitError
from hubkit.registry.api import Arrived, CommitInfo, Refs, RemoteFile
from hubkit.registry.directory import objects
from hubkit.registry.directory.history import Commit, FileTree, History
from hubkit.registry.directory.layout import Layout
from hubkit.registry.directory.objects import Entry


class DirectoryReader(Layout):
    """What can be asked of a directory registry."""

    def resolve(self, repo: str, revision: str | None = None) -> str:
        """See `Registry`; also knows ``HEAD``, ``refs/heads/<branch>`` and ``refs/tags/<tag>``; a tag comes first."""
        refs, wanted = self.refs(repo), "refs/heads/main" if revision in (None, "HEAD") else revision
        kind, _, short = wanted.removeprefix("refs/").partition("/")
        if wanted.startswith("refs/") and kind in ("heads", "tags"):
            found = (refs.branches if kind == "heads" else refs.tags).get(short)
        else:
            found = refs.tags.get(wanted) or refs.branches.get(wanted)
        history = History(self._folder(repo))
        found = found or (wanted if history.has(wanted) else history.find(wanted))
        if found is None:
            known = ", ".join([*refs.branches, *refs.tags][:20])
            raise HubkitError(
                "HK-NOT-FOUND", f"no revision '{wanted}' in {repo}", where=f"{self.name}/{repo}", have=known
            )
        return found

    def files(self, repo: str, commit: str) -> tuple[RemoteFile, ...]:
        """See `Registry`; every digest is known."""
        return tuple(RemoteFile(path, e.size, f"sha256:{e.sha256}") for path, e in self.tree(repo, commit).items())

    def tree(self, repo: str, commit: str) -> FileTree:
        """All files of a commit by path, with git's names for them."""
        return History(self._folder(repo)).tree(commit)

    def one(self, repo: str, commit: str) -> Commit:
        """A commit's own document."""
        return History(self._folder(repo)).read(commit)

    def history(self, repo: str, commit: str) -> list[Commit]:
        """A commit and its ancestors, newest first."""
        return History(self._folder(repo)).log(commit)

    def log(self, repo: str, commit: str) -> tuple[CommitInfo, ...]:
        """See `Registry`."""
        line = self.history(repo, commit)
        days = (datetime.fromtimestamp(one.time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for one in line)
        return tuple(CommitInfo(one.id, one.title, day, one.author) for one, day in zip(line, days, strict=True))

    def refs(self, repo: str) -> Refs:
        """See `Registry`."""
        data = self._document(repo, "refs.json")
        try:
            return Refs(dict(data["branches"]), dict(data["tags"]))
        except (KeyError, TypeError, ValueError):
            raise self._damaged(repo, "refs.json") from None

    def object(self, repo: str, sha256: str) -> Path:
        """The file that holds an object of this repository; HK-NOT-FOUND when it does not have it."""
        path = objects.object_path(self._folder(repo) / "objects", sha256)
        if not path.is_file():
            raise HubkitError("HK-NOT-FOUND", "no such object", where=f"{self.name}/{repo}", have=f"sha256:{sha256}")
        return path

    def holds(self, repo: str, sha256: str) -> bool:
        """Whether this repository has an object."""
        return objects.object_path(self._folder(repo) / "objects", sha256).is_file()

    def entry(self, repo: str, commit: str, path: str) -> Entry:
        """What a commit knows of one file; HK-NOT-FOUND."""
        entry = self.tree(repo, commit).get(path)
        if entry is None:
            raise HubkitError("HK-NOT-FOUND", f"no file '{path}'", where=f"{self.name}/{repo}@{commit[:12]}")
        return entry

    def read(self, repo: str, commit: str, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Registry`."""
        entry = self.entry(repo, commit, path)
        stop = entry.size if stop is None else min(stop, entry.size)
        with objects.open_regular(self.object(repo, entry.sha256)) as source:
            source.seek(start)
            return source.read(max(0, stop - start))

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
        """See `Registry`; HK-FILES when the stored bytes no longer have their digest. It always begins anew."""
        entry = self.entry(repo, commit, path)
        if resume:
            dest.unlink(missing_ok=True)
        try:
            with objects.open_regular(self.object(repo, entry.sha256)) as source, dest.open("xb") as out:
                if objects.copy(source, out, progress) != entry.sha256:
                    raise HubkitError("HK-FILES", f"stored content of '{path}' is damaged", where=f"{self.name}/{repo}")
                out.flush()
                os.fsync(out.fileno())
        except FileExistsError:
            raise HubkitError("HK-EXISTS", "file is already there", where=str(dest)) from None
        except BaseException:
            dest.unlink(missing_ok=True)
            raise
        return f"sha256:{entry.sha256}"

    def repos(self, prefix: str | None = None) -> tuple[str, ...]:
        """See `Registry`; private ones, too: who may read the directory may read all of it."""
        organization, slash, start = (prefix or "").partition("/")
        found = []
        for path in self.root.glob("repos/*/*/refs.json"):
            name, org = path.parent.name, path.parent.parent.name
            if (not organization or org == organization) and (not slash or name.startswith(start)):
                found.append(f"{org}/{name}")
        return tuple(sorted(found))

    def private(self, repo: str) -> bool:
        """Whether a server hides the repository from those who may not see it."""
        return self._document(repo, "repo.json").get("private") is not False

    def created(self, repo: str) -> float:
        """When the repository was made, seconds since 1970."""
        return (self._folder(repo) / "objects" / ".made").stat().st_mtime
