"""A registry in a directory: repositories of content-addressed objects, commits and refs, safe for several processes.

Layout below the root::

    registry.json                     {"schema": "hubkit/registry/1"}
    locks/<org>--<name>.lock          never removed
    scratch/                          unfinished work; swept when its owner is dead
    moved/<org>--<name>.json          {"to": "org/other"}: what a repository that had this name is called now
    repos/<org>/<name>/repo.json      {"private": false}
    repos/<org>/<name>/refs.json      {"branches": {...}, "tags": {...}}: the one file that changes
    repos/<org>/<name>/commits/ trees/ objects/<2 hex>/<64 hex>      written once, named by their hash

A commit writes objects, then tree and commit, then replaces `refs.json`, each synced before the next and each by
rename: a process killed anywhere leaves the old state or the new one. Writers hold the repository's lock while they
compare the tip with the parent they were given and swap it; readers need no lock.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hubkit.documents.drafts import scratch
from hubkit.documents.files import sync_folder
from hubkit.documents.names import check_names
from hubkit.errors import HubkitError
from hubkit.registry.directory import objects, rules
from hubkit.registry.directory.history import FileTree, History
from hubkit.registry.directory.keeping import Keeper
from hubkit.registry.directory.layout import dump
from hubkit.registry.directory.objects import Incoming, publish
from hubkit.registry.versions import parse_version

REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,254}")
MAX_FILES = 100_000
Edit = Callable[[FileTree], None]


class DirectoryRegistry(Keeper):
    """The `Registry` protocol on a directory, plus what a server in front of it needs.

    Args:
        root: the directory; made by the first `create`.
    """

    # repositories

    def create(self, repo: str, *, private: bool = False) -> bool:
        """See `Registry`; HK-EXISTS when one is there whose name differs only in case."""
        self._begin()
        with self._guard(), self._locked(repo), scratch(self.root / "scratch") as work:
            target = self._path(repo)
            if target.exists():
                return False
            twins = [r for r in self.repos() if r.casefold() == repo.casefold()]
            if twins:
                raise HubkitError("HK-EXISTS", "a repository of this name in other letters exists", have=twins[0])
            made = work / "repo"
            (made / "objects").mkdir(parents=True)
            (made / "objects" / ".made").touch()
            History.prepare(made)
            first = History(made).add({}, (), "initial commit", "", work)
            publish(made / "repo.json", dump({"private": private}), work)
            if private:
                _hide(made, True)
            publish(made / "refs.json", dump({"branches": {"main": first}, "tags": {}}), work)
            target.parent.mkdir(exist_ok=True)
            self._move_marker(repo).unlink(missing_ok=True)
            os.rename(made, target)
            sync_folder(target.parent)
            sync_folder(self.root / "repos")
        return True

    def delete(self, repo: str) -> None:
        """Remove a repository and all its bytes; HK-NOT-FOUND."""
        with self._guard(), self._locked(repo), scratch(self.root / "scratch") as work:
            os.rename(self._folder(repo), work / "repo")

    def move(self, repo: str, target: str) -> None:
        """Give a repository another name, to which its old one leads from now on; HK-EXISTS when that is taken."""
        first, second = sorted([repo, target])
        with self._guard(), self._locked(first), ExitStack() as stack:
            if first != second:
                stack.enter_context(self._locked(second))
            source, destination = self._folder(repo), self._path(target)
            if destination.exists():
                raise HubkitError("HK-EXISTS", "a repository of this name exists", where=f"{self.name}/{target}")
            destination.parent.mkdir(exist_ok=True)
            marker = self._move_marker(repo)
            marker.parent.mkdir(exist_ok=True)
            with scratch(self.root / "scratch") as work:
                publish(marker, dump({"to": target}), work)
            self._move_marker(target).unlink(missing_ok=True)
            os.rename(source, destination)
            sync_folder(destination.parent)

    def set_private(self, repo: str, private: bool) -> None:
        """Hide a repository from strangers of a server, or show it."""
        with self._writing(repo) as (folder, work):
            _hide(folder, True)  # first, so that there is no moment when it is private and open
            publish(folder / "repo.json", dump({"private": private}), work)
            _hide(folder, private)

    # commits

    def commit(
        self,
        repo: str,
        add: Mapping[str, Path | bytes],
        delete: Iterable[str],
        *,
        message: str,
        parent: str | None,
        branch: str = "main",
        author: str = "",
    ) -> str:
        """See `Registry`; returns the tip when nothing would change. Names are checked (HK-NAME)."""
        removed = tuple(delete)
        self._check_names(repo, add)
        self._tip(repo, branch, parent)  # a stale one is refused before anything is copied
        entries = self.put(repo, add)

        def edit(tree: FileTree) -> None:
            for path in removed:
                if tree.pop(path, None) is None:
                    raise HubkitError("HK-NOT-FOUND", f"no file '{path}' to delete", where=f"{self.name}/{repo}")
            tree.update(entries)

        return self.change(repo, edit, message=message, parent=parent, branch=branch, author=author)

    def change(
        self, repo: str, edit: Edit, *, message: str, parent: str | None, branch: str = "main", author: str = ""
    ) -> str:
        """Apply `edit` to the tip's tree and commit it, all under the lock; the id of the new tip.

        Raises:
            HubkitError: HK-STALE, HK-NAME, HK-LIMIT, whatever `edit` raises; nothing has changed then.
        """
        with self._writing(repo) as (folder, work):
            tip, history = self._tip(repo, branch, parent), History(folder)
            before = history.tree(tip)
            tree = dict(before)
            edit(tree)
            self._check_names(repo, tree)
            if tree == before:
                return tip
            self._require_objects(repo, {path: entry for path, entry in tree.items() if before.get(path) != entry})
            commit = history.add(tree, (tip,), message, author, work)
            self._set(repo, work, branches={branch: commit})
        return commit

    def put(self, repo: str, files: Mapping[str, Path | bytes]) -> FileTree:
        """Store files' bytes for a commit to come; git attributes of the current tip decide how."""
        folder, attributes = self._folder(repo) / "objects", self.attributes(repo)
        with self._guard(), scratch(self.root / "scratch") as work:
            return {path: objects.ingest(folder, work, path, content, attributes) for path, content in files.items()}

    def _require_objects(self, repo: str, entries: FileTree) -> None:
        """Under the lock: what a commit names is there, whatever was collected since it was put there."""
        folder = self._folder(repo) / "objects"
        gone = [path for path, one in entries.items() if not objects.object_path(folder, one.sha256).is_file()]
        if gone:
            what, fix = "content of the commit is not there", "send it again"
            raise HubkitError("HK-FILES", what, where=f"{self.name}/{repo}", have=gone, fix=fix)

    def attributes(self, repo: str) -> tuple[rules.Rule, ...]:
        """The rules of the tip's `.gitattributes`, or the default ones."""
        tip = self.resolve(repo, None)
        entry = self.tree(repo, tip).get(".gitattributes")
        if entry is None or entry.size > 1 << 20:
            return rules.DEFAULT
        text = self.object(repo, entry.sha256).read_text("utf-8", errors="replace")
        return tuple(rules.read_attributes(text))

    @contextmanager
    def receive(self, repo: str, limit: int) -> Iterator[Incoming]:
        """A stream into the repository's objects, at most `limit` bytes; nothing stays unless it is finished."""
        folder = self._folder(repo)
        with self._guard(), scratch(self.root / "scratch") as work:
            incoming = Incoming(folder / "objects", work, limit)
            try:
                yield incoming
            finally:
                incoming.close()

    def squash(self, repo: str, branch: str, message: str, author: str = "") -> str:
        """Replace a branch's history by one commit with the same files; old commits stay readable by their id."""
        with self._writing(repo) as (folder, work):
            history = History(folder)
            tree = history.tree(self._tip(repo, branch, None))
            commit = history.add(tree, (), message, author, work)
            self._set(repo, work, branches={branch: commit})
        return commit

    # names of commits

    def tag(self, repo: str, name: str, commit: str) -> None:
        """See `Registry`."""
        check_ref(name)
        with self._writing(repo) as (folder, work):
            if name in self.refs(repo).branches:
                raise self._taken(repo, f"a branch is called '{name}'")
            old = self.refs(repo).tags.get(name)
            if old is not None and old != commit:
                raise HubkitError(
                    "HK-VERSION-EXISTS",
                    f"tag '{name}' exists at another commit",
                    where=f"{self.name}/{repo}",
                    want=commit,
                    have=old,
                    fix="publish it under a new version",
                )
            History(folder).read(commit)
            self._set(repo, work, tags={name: commit})

    def branch(self, repo: str, name: str, commit: str) -> None:
        """Start a branch at a commit.

        Raises:
            HubkitError: HK-EXISTS when a branch or a tag has this name; HK-NAME for the name of a version, which means
                the same bytes for ever.
        """
        check_ref(name)
        if parse_version(name.removeprefix("v")):
            fix = "tag the commit instead"
            raise HubkitError("HK-NAME", "a version is a tag; a branch moves", have=name[:200], fix=fix)
        with self._writing(repo) as (folder, work):
            refs = self.refs(repo)
            if name in refs.branches or name in refs.tags:
                kind = "branch" if name in refs.branches else "tag"
                raise self._taken(repo, f"{kind} '{name}' exists")
            History(folder).read(commit)
            self._set(repo, work, branches={name: commit})

    def delete_tag(self, repo: str, name: str) -> None:
        """Remove a tag; HK-NOT-FOUND."""
        with self._writing(repo) as (_, work):
            if name not in self.refs(repo).tags:
                raise HubkitError("HK-NOT-FOUND", f"no tag '{name}'", where=f"{self.name}/{repo}")
            self._set(repo, work, tags={name: None})

    def delete_branch(self, repo: str, name: str) -> None:
        """Remove a branch; HK-NOT-FOUND, HK-FORBIDDEN for ``main``."""
        with self._writing(repo) as (_, work):
            if name not in self.refs(repo).branches:
                raise HubkitError("HK-NOT-FOUND", f"no branch '{name}'", where=f"{self.name}/{repo}")
            if name == "main":
                raise HubkitError("HK-FORBIDDEN", "branch 'main' cannot be removed", where=f"{self.name}/{repo}")
            self._set(repo, work, branches={name: None})

    def _taken(self, repo: str, what: str) -> HubkitError:
        fix = "choose another name"
        return HubkitError("HK-EXISTS", what, where=f"{self.name}/{repo}", fix=fix)

    def _tip(self, repo: str, branch: str, parent: str | None) -> str:
        tip = self.refs(repo).branches.get(branch)
        if tip is None:
            raise HubkitError("HK-NOT-FOUND", f"no branch '{branch}'", where=f"{self.name}/{repo}")
        if parent is not None and not (len(parent) >= 5 and tip.startswith(parent.lower())):
            raise HubkitError(
                "HK-STALE",
                "a commit has happened since",
                where=f"{self.name}/{repo}@{branch}",
                want=f"{parent} at the tip",
                have=tip,
                fix="look at what changed and try again",
            )
        return tip

    def _set(
        self,
        repo: str,
        work: Path,
        *,
        branches: Mapping[str, str | None] | None = None,
        tags: Mapping[str, str | None] | None = None,
    ) -> None:
        """Replace the refs; None removes one. Call it under the lock."""
        now = self.refs(repo)
        new = {
            "branches": {k: v for k, v in {**now.branches, **(branches or {})}.items() if v is not None},
            "tags": {k: v for k, v in {**now.tags, **(tags or {})}.items() if v is not None},
        }
        publish(self._path(repo) / "refs.json", dump(new), work)

    def _check_names(self, repo: str, paths: Iterable[str]) -> None:
        names = list(paths)
        if len(names) > MAX_FILES:
            raise HubkitError("HK-LIMIT", "too many files", have=str(len(names)), want=f"at most {MAX_FILES}")
        check_names(names, f"{self.name}/{repo}")


def _hide(folder: Path, private: bool) -> None:
    """Keep all others of this machine out of a repository's folder, or let those in who may enter the one above."""
    mode = stat.S_IMODE(folder.stat().st_mode) & ~0o007
    os.chmod(folder, mode if private else mode | (stat.S_IMODE(folder.parent.stat().st_mode) & 0o005))


def check_ref(name: str) -> None:
    """HK-NAME for what git would not take as the name of a branch or tag, or what reads like a commit id."""
    bad = not REF.fullmatch(name) or ".." in name or "//" in name or name.endswith(("/", ".", ".lock"))
    if bad or "/." in name or name == "HEAD" or re.fullmatch(r"[0-9a-f]{40}", name) or name.startswith("refs/"):
        raise HubkitError("HK-NAME", "not a name for a branch or tag", have=name[:200])
