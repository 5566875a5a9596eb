"""The Hugging Face Hub, and any server that speaks its protocol, as a `Registry`.

A commit is one request: files of text travel in it, large ones before it by LFS (`uploads`), which every server of this
protocol understands; the client library would choose Xet without asking the server, and several commits for a folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hubkit.compat import huggingface_hub as client
from hubkit.documents.names import check_names
from hubkit.errors import HubkitError
from hubkit.registry.address import HUB, check_endpoint, origin
from hubkit.registry.hub import faults, uploads
from hubkit.registry.hub.deadlines import Deadlines
from hubkit.registry.hub.faults import Asked
from hubkit.registry.hub.listing import HEX40, matches
from hubkit.registry.hub.reader import HubReader
from hubkit.registry.hub.streams import SharedFile, opened
from hubkit.registry.hub.transport import Reader, read_json

PREUPLOAD = 200
"""Files that a server is asked about at once."""
_BLOCK = 1 << 20
_SAMPLE = 512


class HuggingFaceRegistry(HubReader):
    """The `Registry` protocol over HTTP.

    Args:
        endpoint: the server's address; None is ``HF_ENDPOINT`` or the Hugging Face Hub.
        token: sent as it is; None takes it from the environment: the user's Hugging Face token (``HF_TOKEN`` or the
            token file) for the Hub and ``HF_ENDPOINT`` only, ``HUBKIT_TOKEN`` for any other server.
        trusted: whether the user configured this server; one that only a reference names gets no ``HUBKIT_TOKEN``.
        source: the environment variable that `token` comes from, for people.
    """

    def __init__(
        self, endpoint: str | None = None, *, token: str | None = None, trusted: bool = True, source: str = ""
    ) -> None:
        super().__init__(check_endpoint(endpoint or os.environ.get("HF_ENDPOINT") or HUB))
        self._token = token
        self._source = source
        self._trusted = trusted
        self._lazy_reader: Reader | None = None

    def create(self, repo: str, *, private: bool = False) -> bool:
        """See `Registry`."""
        asked = self._asked(repo)
        owner, _, name = repo.partition("/")
        document = {"name": name, "organization": owner, "private": private}
        try:
            made = self._reader.post("/api/repos/create", document, asked, tries=False)
        except HubkitError as fault:
            if fault.code != "HK-EXISTS":
                raise
            return False
        if not isinstance(made, dict) or not isinstance(made.get("url"), str):
            raise faults.malformed("no address of the new repository", asked, have=json.dumps(made)[:80])
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
        """Make the commit; its id."""
        revision = quote(asked.revision or "main", safe="")
        large = self._modes(asked, revision, files)
        objects = {path: uploads.Upload(_sha256(files[path]), files[path], size) for path, size in large.items()}
        uploads.send(self._reader, asked, {one.oid: one for one in objects.values()})
        body = b"\n".join(_lines(files, objects, removed, message, parent))
        made = self._reader.ask(
            "POST",
            f"{self.endpoint}/api/models/{asked.repo}/commit/{revision}",
            asked,
            lambda _, pieces: read_json(pieces, asked),
            {"Content-Type": "application/x-ndjson"},
            body=body,
            total=Deadlines.read().for_bytes(len(body)),
            tries=False,
        )
        commit = made.get("commitOid") if isinstance(made, dict) else None
        if not isinstance(commit, str) or not HEX40.fullmatch(commit):
            raise faults.malformed("no commit of 40 hex digits", asked, have=json.dumps(made)[:80])
        return commit

    def _modes(self, asked: Asked, revision: str, files: Mapping[str, SharedFile]) -> dict[str, int]:
        """The files that the server wants as large objects, with their sizes; an empty one never is."""
        rows: list[dict[str, Any]] = []
        for path, file in files.items():
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            sample = base64.b64encode(file.read(_SAMPLE)).decode()
            rows.append({"path": path, "size": size, "sample": sample})
        modes: dict[str, Any] = {}
        for at in range(0, len(rows), PREUPLOAD):
            asking = {"files": rows[at : at + PREUPLOAD]}
            answer = self._reader.post(f"/api/models/{asked.repo}/preupload/{revision}", asking, asked)
            listed = answer.get("files") if isinstance(answer, dict) else None
            if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
                raise faults.malformed("not how files are to be sent", asked)
            modes |= {str(row.get("path")): row.get("uploadMode") for row in listed}
        unknown = [row["path"] for row in rows if modes.get(row["path"]) not in ("lfs", "regular")]
        if unknown:
            raise faults.malformed("not how each file is to be sent", asked, have=", ".join(map(str, unknown[:5])))
        return {row["path"]: row["size"] for row in rows if row["size"] and modes[row["path"]] == "lfs"}

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
            self._reader.post(f"/api/models/{repo}/tag/{commit}", {"tag": name}, asked)
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
        if self._own_origin():
            from huggingface_hub import get_token

            return get_token()
        return os.environ.get("HUBKIT_TOKEN") or None if self._trusted else None

    def token_source(self) -> str | None:
        """Where the token that this server gets comes from, a variable or a file; None: it gets none."""
        if not self._secret():
            return None
        if self._token is not None:
            return self._source or "the program"
        if not self._own_origin():
            return "HUBKIT_TOKEN"
        from huggingface_hub.constants import HF_TOKEN_PATH

        names = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        return next((name for name in names if os.environ.get(name)), HF_TOKEN_PATH)

    def whoami(self) -> Mapping[str, Any]:
        """Whose token it is, and what it may do, as the server says: ``name``, ``orgs``, ``auth``.

        Raises:
            HubkitError: ``HK-AUTH`` for no token, or one that is not accepted; ``HK-REGISTRY``, ``HK-OFFLINE``.
        """
        asked = Asked(self.name)
        found = self._reader.json("/api/whoami-v2", asked)
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            raise faults.malformed("nobody's name", asked, have=json.dumps(found)[:80])
        return found

    def _own_origin(self) -> bool:
        """Whether this server is the Hub, or what the user says is the Hub."""
        return origin(self.endpoint) in (origin(HUB), origin(os.environ.get("HF_ENDPOINT") or HUB))

    def _headers(self) -> dict[str, str]:
        from hubkit import __version__

        about = {"library_name": "hubkit", "library_version": __version__}
        return dict(client.helpers().build_hf_headers(token=self._secret() or False, **about))


def _lines(
    files: Mapping[str, SharedFile],
    objects: Mapping[str, uploads.Upload],
    removed: Iterable[str],
    message: str,
    parent: str | None,
) -> Iterator[bytes]:
    """A commit as the lines of its request: what is removed first, then what is added."""
    title, _, description = message.partition("\n")
    header = {"summary": title, "description": description.strip("\n")}
    yield _line("header", {**header, **({"parentCommit": parent} if parent else {})})
    for path in removed:
        yield _line("deletedFile", {"path": path})
    for path, file in files.items():
        if path in objects:
            one = objects[path]
            yield _line("lfsFile", {"path": path, "algo": "sha256", "oid": one.oid, "size": one.size})
            continue
        file.seek(0)
        yield _line("file", {"path": path, "content": base64.b64encode(file.read()).decode(), "encoding": "base64"})


def _line(key: str, value: Mapping[str, Any]) -> bytes:
    return json.dumps({"key": key, "value": value}).encode()


def _sha256(file: SharedFile) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _stale(asked: Asked, parent: str | None, have: str) -> HubkitError:
    fix = "look at what changed and try again"
    return HubkitError(
        "HK-STALE", "a commit has happened since", where=asked.where, want=parent or "", have=have, fix=fix
    )
