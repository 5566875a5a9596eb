"""Writing: how files should come (preupload), and one atomic commit from a stream of JSON lines."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from hubkit.errors import HubkitError
from hubkit.registry.directory import rules
from hubkit.registry.directory.directory import DirectoryRegistry
from hubkit.registry.directory.history import FileTree
from hubkit.registry.directory.objects import Entry, large_entry
from hubkit.registry.directory.quota import Quotas
from hubkit.registry.server.calls import Call, Refusal, whole
from hubkit.registry.server.cards import read_front

PARENT = re.compile(r"[0-9a-fA-F]{5,40}")
MAX_OPERATIONS = 25_000
PREUPLOAD_FILES = 1000


def validate_yaml(call: Call) -> Response:
    """POST /api/validate-yaml: whether the front matter of a card can be read."""
    problem = read_front(call.text(call.json(), "content"))[1]
    if problem is not None:
        return JSONResponse({"errors": [{"message": problem}], "warnings": []}, 400)
    return JSONResponse({"errors": [], "warnings": []})


def preupload(call: Call) -> Response:
    """POST /api/models/{id}/preupload/{rev}: large or regular, ignored or not, and what is there already."""
    repo, data = call.writable(), call.json()
    if call.flag("create_pr"):
        raise Refusal(400, "This server has no pull requests")
    files = data.get("files")
    if not isinstance(files, list) or len(files) > PREUPLOAD_FILES:
        raise Refusal(400, f"'files' must be a list of at most {PREUPLOAD_FILES}")
    current = call.registry.tree(repo, call.commit(repo))
    attributes = call.registry.attributes(repo)
    ignores = rules.read_ignores(_ignore_text(call, repo, current, data.get("gitIgnore")))
    work = rules.Work()
    try:
        advice = [_advice(call, f, current, attributes, ignores, work) for f in files]
    except HubkitError as error:
        raise Refusal(400, error.what) from None
    # here a client shows what is said; of its own storage protocol it shows the number alone. A file of a size that is
    # there already may be that one
    sizes = {entry.size for entry in current.values()}
    new = [f["size"] for f, told in zip(files, advice, strict=True) if not told["shouldIgnore"]]
    call.server.quotas.require(repo, sum(size for size in new if size not in sizes))
    return JSONResponse({"files": advice})


def _ignore_text(call: Call, repo: str, current: FileTree, sent: object) -> str:
    entry = current.get(".gitignore")
    if isinstance(sent, str):
        return sent
    if entry is None or entry.size > 1 << 20:
        return ""
    return call.registry.object(repo, entry.sha256).read_text("utf-8", errors="replace")


def _advice(
    call: Call, file: object, current: FileTree, attributes: tuple[rules.Rule, ...], ignores: Any, work: rules.Work
) -> dict[str, Any]:
    if not isinstance(file, dict) or not isinstance(file.get("size"), int):
        raise Refusal(400, "each of 'files' needs 'path', 'size' and 'sample'")
    path, size = call.text(file, "path"), file["size"]
    if len(path) > 4096:
        raise Refusal(400, "a path has 4096 characters at most")
    try:
        sample = base64.b64decode(str(file.get("sample", "")), validate=True)
    except ValueError:
        raise Refusal(400, "'sample' must be base64") from None
    large = rules.is_large(path, size, sample, attributes, work)
    entry = current.get(path)
    oid = None
    if entry is not None and (large or not entry.large):
        oid = entry.sha256 if large else entry.oid  # what the client compares its own file with
    advice = {
        "path": path,
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": rules.ignored(ignores, path, work),
    }
    return {**advice, "oid": oid} if oid else advice


@dataclass
class Draft:
    """The operations of a commit as they come in; content is stored at once, nothing is visible yet.

    Args:
        registry: where.
        repo: what is committed to.
        quotas: what may be stored.
        young: the objects that came with it: sha256 -> their time in nanoseconds.
    """

    registry: DirectoryRegistry
    repo: str
    quotas: Quotas
    summary: str = ""
    description: str = ""
    parent: str | None = None
    operations: list[tuple[str, str, Entry | None]] = field(default_factory=list)
    young: dict[str, int] = field(default_factory=dict)

    def take(self, line: bytes) -> None:
        """One JSON line of the body."""
        try:
            item = whole(json.loads(line), line)
            key, value = item["key"], item["value"]
            if key == "header":
                self._header(value)
                return
            path = value["path"]
            if not isinstance(path, str) or len(path) > 4096:
                raise TypeError
            if key == "file":
                self.operations.append(("add", path, self._regular(path, _content(value))))
            elif key == "lfsFile":
                self.operations.append(("add", path, self._large(value)))
            elif key in ("deletedFile", "deletedFolder"):
                self.operations.append((key, path.rstrip("/"), None))
            else:
                raise Refusal(400, f"Unknown operation '{key}'"[:200])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refusal(400, "Malformed line in commit") from None
        if len(self.operations) > MAX_OPERATIONS:
            raise Refusal(413, f"A commit may have {MAX_OPERATIONS} operations at most")

    def _header(self, value: dict[str, Any]) -> None:
        self.summary = str(value.get("summary") or "")[:1000]
        self.description = str(value.get("description") or "")[:65536]
        parent = value.get("parentCommit")
        if parent is not None and not (isinstance(parent, str) and PARENT.fullmatch(parent)):
            raise Refusal(400, "parentCommit must be 5 to 40 hex digits")
        self.parent = parent

    def _regular(self, path: str, data: bytes) -> Entry:
        sha256 = hashlib.sha256(data).hexdigest()
        known = self.registry.holds(self.repo, sha256)
        with self.quotas.holding(self.repo, 0 if known else len(data)):
            entry = self.registry.put(self.repo, {path: data})[path]
        if not known:
            self.young[sha256] = self.registry.object(self.repo, sha256).stat().st_mtime_ns
        return entry

    def _large(self, value: dict[str, Any]) -> Entry:
        oid = value["oid"]
        try:
            size = self.registry.object(self.repo, oid).stat().st_size
        except HubkitError:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {oid}"[:200]) from None
        if value.get("size", size) != size:
            raise Refusal(400, f"Size of {oid} is {size}, not {value['size']}")
        return large_entry(oid, size)

    def apply(self, tree: FileTree) -> None:
        """Do the operations, in order, to a tree."""
        for kind, path, entry in self.operations:
            if entry is not None:
                tree[path] = entry
                continue
            gone = [p for p in tree if p.startswith(path + "/")] if kind == "deletedFolder" else [path]
            if not gone or gone[0] not in tree:
                raise Refusal(404, f"A file to delete does not exist: {path}", "EntryNotFound")
            for name in gone:
                del tree[name]

    @property
    def message(self) -> str:
        """Title and description as one text."""
        title = self.summary or "Upload with hubkit"
        return f"{title}\n\n{self.description}" if self.description else title


def _content(value: dict[str, Any]) -> bytes:
    content, encoding = value["content"], value.get("encoding", "utf-8")
    if encoding == "base64":
        return base64.b64decode(content, validate=True)
    if encoding != "utf-8":
        raise Refusal(400, "encoding must be base64 or utf-8")
    return str(content).encode()


async def _lines(call: Call) -> AsyncIterator[bytes]:
    """Lines of the body; no more of it is in memory than one line and what arrived with it."""
    longest = call.server.limits.regular * 4 // 3 + (1 << 16)
    pieces: list[bytes] = []
    total = held = 0
    async for data in call.request.stream():
        total += len(data)
        if total > call.server.limits.commit:
            raise Refusal(413, f"A commit's body may have {call.server.limits.commit} bytes at most")
        *whole, rest = data.split(b"\n")
        for line in whole:
            yield b"".join([*pieces, line])
            pieces, held = [], 0
        pieces.append(rest)
        held += len(rest)
        if held > longest:
            raise Refusal(413, f"A regular file may have {call.server.limits.regular} bytes at most")
    yield b"".join(pieces)


async def commit(call: Call) -> Response:
    """POST /api/models/{id}/commit/{branch}: 412 when the parent is no longer the tip."""
    repo = await run_in_threadpool(call.writable)
    branch = call.part("rev")
    if call.flag("create_pr"):
        raise Refusal(400, "This server has no pull requests")
    draft = Draft(call.registry, repo, call.server.quotas)
    try:
        async for line in _lines(call):
            if line.strip():
                await run_in_threadpool(draft.take, line)
        made = await run_in_threadpool(_finish, call, draft, branch.removeprefix("refs/heads/"))
    except HubkitError as error:
        if error.code == "HK-QUOTA":
            await run_in_threadpool(call.registry.discard, repo, draft.young)
        raise
    call.seen.details["commit"] = made
    url = f"{call.origin}/{repo}/commit/{made}"
    return JSONResponse({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})


def _finish(call: Call, draft: Draft, branch: str) -> str:
    if branch not in call.registry.refs(draft.repo).branches:
        raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    if any(entry is not None for _, _, entry in draft.operations):  # whoever only removes may do so at any time
        call.server.quotas.require(draft.repo, 0)
    return call.registry.change(
        draft.repo, draft.apply, message=draft.message, parent=draft.parent, branch=branch, author=call.author
    )
