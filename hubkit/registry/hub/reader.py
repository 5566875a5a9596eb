"""The reading half of the Hub's protocol: listings, files and refs of repositories, checked as they arrive."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from hubkit.errors import HubkitError
from hubkit.registry.address import is_repo, require_repo
from hubkit.registry.api import Arrived, CommitInfo, Refs, RemoteFile
from hubkit.registry.hub import faults
from hubkit.registry.hub.faults import Asked
from hubkit.registry.hub.listing import HEX40, Expected, expected, matches
from hubkit.registry.hub.transport import Reader
from hubkit.registry.versions import no_revision

MAX_FILES = 100_000
MAX_REPOS = 100_000
Listing = Mapping[str, Expected]


class HubReader:
    """What can be asked of a server that speaks the Hub's protocol.

    Args:
        endpoint: the server's address.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._trees: OrderedDict[tuple[str, str], Listing] = OrderedDict()

    @property
    def name(self) -> str:
        """The server's address."""
        return self.endpoint

    @property
    def _reader(self) -> Reader:
        raise NotImplementedError

    def resolve(self, repo: str, revision: str | None = None) -> str:
        """See `Registry`; HK-NO-REVISION, with the nearest names, for a revision that is not there."""
        asked = self._asked(repo, revision)
        tail = "" if revision is None else f"/revision/{quote(revision, safe='')}"
        try:
            info = self._reader.json(f"/api/models/{repo}{tail}", asked)
        except HubkitError as fault:
            if fault.code != "HK-NO-REVISION" or revision is None:
                raise
            refs = self.refs(repo)
            raise no_revision(self.name, repo, revision, [*refs.branches, *refs.tags]) from None
        commit = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(commit, str) or not HEX40.fullmatch(commit):
            raise faults.malformed("no commit of 40 hex digits", asked, have=str(commit))
        if revision is not None and HEX40.fullmatch(revision) and commit != revision:
            raise faults.malformed("another commit than the one asked for", asked, have=commit)
        return commit

    def files(self, repo: str, commit: str) -> tuple[RemoteFile, ...]:
        """See `Registry`; the digest of small files is known after `download`, which checks git's name of them."""
        tree = self._tree(repo, commit)
        return tuple(RemoteFile(p, e.size, f"sha256:{e.sha256}" if e.sha256 else None) for p, e in tree.items())

    def read(self, repo: str, commit: str, path: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Registry`. Only a whole file can be checked against its digest; a range is as the server gives it."""
        entry = self._entry(repo, commit, path)
        start = max(start, 0)
        stop = entry.size if stop is None else min(stop, entry.size)
        asked = self._asked(repo, commit, path)
        if stop <= start:
            return b""
        data = self._reader.read(_file_url(repo, commit, path), asked, start, stop)
        if len(data) == entry.size and not matches(io.BytesIO(data), entry):
            raise HubkitError("HK-FILES", "a file is not what the registry's list says", where=asked.where)
        return data

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
        """See `Registry`; the bytes are those of the commit's listing (sha256, or git's name of a small file)."""
        entry, asked = self._entry(repo, commit, path), self._asked(repo, commit, path)
        return self._reader.download(_file_url(repo, commit, path), asked, dest, entry, progress, resume)

    def log(self, repo: str, commit: str) -> tuple[CommitInfo, ...]:
        """See `Registry`."""
        asked = self._asked(repo, commit)
        found = []
        for row in self._reader.pages(f"/api/models/{repo}/commits/{quote(commit, safe='')}", asked, MAX_FILES):
            name, authors = row.get("id"), row.get("authors")
            if not isinstance(name, str) or not HEX40.fullmatch(name):
                raise faults.malformed("no list of commits", asked, have=str(name))
            first = authors[0] if isinstance(authors, list) and authors and isinstance(authors[0], dict) else {}
            said = (row.get("title"), row.get("date"), first.get("user"))
            found.append(CommitInfo(name, *(text if isinstance(text, str) else "" for text in said)))
        return tuple(found)

    def refs(self, repo: str) -> Refs:
        """See `Registry`."""
        asked = self._asked(repo)
        data = self._reader.json(f"/api/models/{repo}/refs", asked)
        try:
            found = [{r["name"]: r["targetCommit"] for r in data[kind]} for kind in ("branches", "tags")]
        except (KeyError, TypeError):
            raise faults.malformed("not a list of branches and tags", asked) from None
        if not all(
            isinstance(n, str) and isinstance(c, str) and HEX40.fullmatch(c) for d in found for n, c in d.items()
        ):
            raise faults.malformed("a branch or tag without a commit", asked)
        return Refs(found[0], found[1])

    def repos(self, prefix: str | None = None) -> tuple[str, ...]:
        """See `Registry`. Give a prefix on the Hub itself: it has millions of repositories (HK-LIMIT)."""
        organization, _, start = (prefix or "").partition("/")
        rows = self.models({"author": organization, "search": start, "limit": "1000"})
        names = {str(row.get("id", "")) for row in rows}
        return tuple(sorted(n for n in names if is_repo(n) and (not prefix or n.startswith(f"{organization}/{start}"))))

    def models(self, asked: Mapping[str, str | Sequence[str]]) -> Iterator[dict[str, Any]]:
        """The Hub's list of repositories, page after page as it is read; HK-LIMIT for one without an end.

        Args:
            asked: ``author``, ``search``, ``filter`` (tags, all of which a repository has), ``pipeline_tag``, ``limit``
                (of a page); what is empty is not asked.
        """
        query = urlencode({name: value for name, value in asked.items() if value}, doseq=True)
        return self._reader.pages(f"/api/models?{query}", Asked(self.name), MAX_REPOS)

    def _tree(self, repo: str, commit: str) -> Listing:
        asked = self._asked(repo, commit)
        if not HEX40.fullmatch(commit):
            raise HubkitError("HK-NOT-FOUND", "not a commit id", where=asked.where, want="40 hex digits")
        tree = self._trees.get((repo, commit))
        if tree is None:
            url = f"/api/models/{repo}/tree/{commit}?recursive=true&expand=false"
            rows = self._reader.pages(url, asked, MAX_FILES)
            listed = dict(expected(row, asked) for row in rows if row.get("type") == "file")
            tree = dict(sorted(listed.items()))
            self._trees[repo, commit] = tree  # a commit never changes
            while len(self._trees) > 32:
                self._trees.popitem(last=False)
        return tree

    def _entry(self, repo: str, commit: str, path: str) -> Expected:
        entry = self._tree(repo, commit).get(path)
        if entry is None:
            raise HubkitError("HK-NOT-FOUND", f"no file '{path}'", where=f"{self.name}/{repo}@{commit}")
        return entry

    def _asked(self, repo: str, revision: str | None = None, path: str = "") -> Asked:
        require_repo(repo, self.name)
        return Asked(self.name, repo, revision, path)


def _file_url(repo: str, commit: str, path: str) -> str:
    return f"/{repo}/resolve/{commit}/{quote(path, safe='/')}"
