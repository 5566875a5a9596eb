"""The Hugging Face Hub, and any server that speaks its protocol, as a `Registry`; the one importer of huggingface_hub.

Writing goes through the client's `HfApi` (0.36 to 2.x): one `create_commit`, never `upload_folder`, which splits large
uploads into several commits. Reading goes through the client's session by `transport.Reader`, which says why.
Files are handed over as open binary files: the client then uploads by HTTP (LFS), which every server of this protocol
understands, and not by Xet, which it would otherwise choose without asking the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from hubkit.compat import huggingface_hub as client
from hubkit.documents.names import check_names
from hubkit.errors import HubkitError
from hubkit.registry.address import HUB, check_endpoint, origin
from hubkit.registry.hub import faults
from hubkit.registry.hub.faults import Asked
from hubkit.registry.hub.listing import matches
from hubkit.registry.hub.reader import HubReader
from hubkit.registry.hub.streams import SharedFile, opened
from hubkit.registry.hub.transport import Reader


class HuggingFaceRegistry(HubReader):
    """The `Registry` protocol over HTTP.

    Args:
        endpoint: the server's address; None is ``HF_ENDPOINT`` or the Hugging Face Hub.
        token: sent as it is; None takes it from the environment: the user's Hugging Face token (``HF_TOKEN`` or the
            token file) for the Hub and ``HF_ENDPOINT`` only, ``HUBKIT_TOKEN`` for any other server.
        trusted: whether the user configured this server; one that only a reference names gets no ``HUBKIT_TOKEN``.
    """

    def __init__(self, endpoint: str | None = None, *, token: str | None = None, trusted: bool = True) -> None:
        super().__init__(check_endpoint(endpoint or os.environ.get("HF_ENDPOINT") or HUB))
        self._token = token
        self._trusted = trusted
        self._lazy_reader: Reader | None = None

    def create(self, repo: str, *, private: bool = False) -> bool:
        """See `Registry`."""
        asked = self._asked(repo)
        try:
            with self._calling(asked) as api:
                api.create_repo(repo, private=private, exist_ok=False)
        except HubkitError as fault:
            if fault.code != "HK-EXISTS":
                raise
            return False
        return True

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
        """See `Registry`; afterwards the branch is read again and every file compared (HK-FILES, HK-STALE)."""
        asked, removed = self._asked(repo, branch), tuple(delete)
        check_names([*add, *removed], asked.where)
        tip = self.resolve(repo, branch)
        if parent not in (None, tip):
            raise _stale(asked, parent, tip)  # before anything is uploaded
        with ExitStack() as stack:
            files = {path: stack.enter_context(opened(content)) for path, content in add.items()}
            gone = set(removed) - set(add)
            try:
                commit = self._send(asked, files, removed, message, parent)
            except HubkitError as fault:
                # no clear answer: the commit may have been made all the same
                made = (
                    self._arrived(asked, parent, files, gone) if fault.code in ("HK-OFFLINE", "HK-REGISTRY") else None
                )
                if made is None:
                    raise
                commit = made
            self._confirm(asked, commit, parent, files, gone)
        return commit

    def _send(
        self, asked: Asked, files: Mapping[str, SharedFile], removed: tuple[str, ...], message: str, parent: str | None
    ) -> str:
        title, _, description = message.partition("\n")
        with self._calling(asked) as api:
            from huggingface_hub import CommitOperationAdd, CommitOperationDelete

            deletions = [CommitOperationDelete(path, is_folder=False) for path in removed]
            try:
                done = api.create_commit(
                    asked.repo,
                    [*deletions, *(CommitOperationAdd(path, cast(BinaryIO, file)) for path, file in files.items())],
                    commit_message=title,
                    commit_description=description.strip("\n"),
                    revision=asked.revision,
                    parent_commit=parent,
                )
                return str(done.oid)
            except ValueError as error:
                if not client.is_commit_unread(error):
                    raise
        return self._above(asked, parent)

    def _arrived(self, asked: Asked, parent: str | None, files: Mapping[str, SharedFile], gone: set[str]) -> str | None:
        """The commit that holds what was sent although the answer was lost; None when there is none."""
        try:
            commit = self._above(asked, parent)
            self._confirm(asked, commit, parent, files, gone)
        except HubkitError:
            return None
        return commit

    def _above(self, asked: Asked, parent: str | None) -> str:
        """The commit on top of `parent`, or the branch's tip when there is none or it does not matter."""
        line = self._line(asked)
        above = line.index(parent) - 1 if parent in line else 0
        return line[max(above, 0)]

    def _line(self, asked: Asked) -> list[str]:
        """The commits of a branch, newest first (the first page of them)."""
        rows = self._reader.json(f"/api/models/{asked.repo}/commits/{quote(asked.revision or '', safe='')}", asked)
        line = [str(row.get("id")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        if not line:
            raise faults.malformed("no list of commits", asked)
        return line

    def tag(self, repo: str, name: str, commit: str) -> None:
        """See `Registry`."""
        asked = self._asked(repo, name)
        try:
            with self._calling(asked) as api:
                api.create_tag(repo, tag=name, revision=commit, exist_ok=False)
        except HubkitError as fault:
            if fault.code not in ("HK-EXISTS", "HK-VERSION-EXISTS"):
                raise
        have = self.refs(repo).tags.get(name, "no such tag")
        if have != commit:
            what, fix = f"tag '{name}' exists at another commit", "publish it under a new version"
            raise HubkitError("HK-VERSION-EXISTS", what, where=asked.where, want=commit, have=have, fix=fix)

    def _confirm(
        self, asked: Asked, commit: str, parent: str | None, files: Mapping[str, SharedFile], gone: set[str]
    ) -> None:
        """Do not believe a success: the commit is on the branch, on `parent`, and holds what was sent."""
        line = self._line(asked)
        if commit not in line:
            raise faults.malformed("the commit is not on the branch", asked, have=commit)
        below = line[line.index(commit) + 1 : line.index(commit) + 2]
        if parent is not None and commit != parent and below != [parent]:
            raise _stale(asked, parent, f"{commit} on {below or 'nothing'}")
        tree = self._tree(asked.repo, commit)
        wrong = [path for path in gone if path in tree]
        for path, file in files.items():
            file.seek(0)
            if path not in tree or not matches(file, tree[path]):
                wrong.append(path)
        if wrong:
            what = "the registry's commit is not what was sent"
            raise HubkitError("HK-FILES", what, where=f"{asked.where}@{commit}", have=sorted(wrong))

    @property
    def _reader(self) -> Reader:
        if self._lazy_reader is None:
            self._lazy_reader = Reader(self.endpoint, self._headers)
        return self._lazy_reader

    def _secret(self) -> str | None:
        if self._token is not None:
            return self._token
        here = origin(self.endpoint)
        if here in (origin(HUB), origin(os.environ.get("HF_ENDPOINT") or HUB)):
            from huggingface_hub import get_token

            return get_token()
        return os.environ.get("HUBKIT_TOKEN") or None if self._trusted else None

    def _headers(self) -> dict[str, str]:
        from hubkit import __version__

        about = {"library_name": "hubkit", "library_version": __version__}
        return dict(client.helpers().build_hf_headers(token=self._secret() or False, **about))

    @contextmanager
    def _calling(self, asked: Asked) -> Iterator[Any]:
        """The client, silent, with its errors turned into refusals; `from None`: they hold the request's token."""
        from huggingface_hub import HfApi

        secret = self._secret()
        asked = Asked(asked.registry, asked.repo, asked.revision, asked.path, known=bool(secret))
        try:
            with client.quiet():
                yield HfApi(endpoint=self.endpoint, token=secret or False, library_name="hubkit")
        except client.failures() as error:
            raise faults.from_error(error, asked) from None
        except faults.UNUSABLE as error:
            raise faults.from_error(error, asked) from None


def _stale(asked: Asked, parent: str | None, have: str) -> HubkitError:
    fix = "look at what changed and try again"
    return HubkitError(
        "HK-STALE", "a commit has happened since", where=asked.where, want=parent or "", have=have, fix=fix
    )
