"""What is in a repository: files and folders, branches, tags, commits."""

from __future__ import annotations

import hashlib
from typing import Any

from starlette.responses import JSONResponse, Response

from hubkit.registry.directory.history import FileTree
from hubkit.registry.directory.objects import Entry, pointer_text
from hubkit.registry.server.calls import Call, Refusal, iso, paged

PAGE, PAGE_EXPANDED = 1000, 50
Row = dict[str, Any]


def file_row(path: str, entry: Entry) -> Row:
    """The Hub's listing of a file."""
    row: Row = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.large:
        pointer = len(pointer_text(entry.sha256, entry.size))
        row["lfs"] = {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": pointer}
    return row


def folder_row(path: str, below: list[tuple[str, Entry]]) -> Row:
    """The Hub's listing of a folder; its oid changes with anything in it."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, entry in below:
        digest.update(f"{name}\0{entry.oid}\n".encode())
    return {"type": "directory", "oid": digest.hexdigest(), "size": 0, "path": path}


def rows_below(tree: FileTree, folder: str, recursive: bool) -> list[Row]:
    """Files and folders in `folder` ("" is the root), at any depth when `recursive`, sorted by path."""
    prefix = f"{folder}/" if folder else ""
    folders: dict[str, list[tuple[str, Entry]]] = {}
    rows = []
    for path, entry in tree.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        depths = range(1, len(parts)) if recursive else range(1, min(2, len(parts)))
        for depth in depths:
            folders.setdefault(prefix + "/".join(parts[:depth]), []).append((path, entry))
        if recursive or len(parts) == 1:
            rows.append(file_row(path, entry))
    rows += [folder_row(path, below) for path, below in folders.items()]
    return sorted(rows, key=lambda row: str(row["path"]))


def _expand(call: Call, repo: str, commit: str, rows: list[Row]) -> list[Row]:
    """With the last commit that touched each row; asked for by clients that show dates."""
    log = call.registry.history(repo, commit)
    pending = {str(row["path"]): row for row in rows}
    trees = [call.registry.tree(repo, c.id) for c in log]
    for number, made in enumerate(log):
        older = trees[number + 1] if number + 1 < len(log) else {}
        changed = {p for p in trees[number].keys() | older.keys() if trees[number].get(p) != older.get(p)}
        touched = {parent for path in changed for parent in _parents(path)}
        for path in [p for p in pending if p in touched]:
            last = {"id": made.id, "title": made.title, "date": iso(made.time)}
            pending.pop(path)["lastCommit"] = last
    return rows


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


def tree(call: Call) -> Response:
    """GET /api/models/{id}/tree/{rev}[/{path}]."""
    repo = call.readable()
    commit = call.commit(repo)
    folder = call.part("path").strip("/")
    rows = rows_below(call.registry.tree(repo, commit), folder, call.flag("recursive"))
    if folder and not rows:
        raise Refusal(404, f"{folder} does not exist on '{call.part('rev')}'", "EntryNotFound")
    if call.flag("expand"):
        return paged(call, _expand(call, repo, commit, rows), PAGE_EXPANDED)
    return paged(call, rows, PAGE)


def paths_info(call: Call) -> Response:
    """POST /api/models/{id}/paths-info/{rev}: rows of the paths that exist, form-encoded or JSON."""
    repo = call.readable()
    commit, fields = call.commit(repo), call.fields()
    files = call.registry.tree(repo, commit)
    known = {str(row["path"]): row for row in rows_below(files, "", True)}
    wanted = [path.strip("/") for path in fields.get("paths", [])]
    rows = [known[path] for path in dict.fromkeys(wanted) if path in known]
    if fields.get("expand", ["false"])[0].lower() in ("true", "1"):
        rows = _expand(call, repo, commit, rows)
    return JSONResponse(rows)


def refs(call: Call) -> Response:
    """GET /api/models/{id}/refs."""
    found = call.registry.refs(call.readable())
    branches = [
        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c}
        for n, c in sorted(found.branches.items(), key=lambda item: (item[0] != "main", item[0]))
    ]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in sorted(found.tags.items())]
    return JSONResponse({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def commits(call: Call) -> Response:
    """GET /api/models/{id}/commits/{rev}: newest first."""
    repo = call.readable()
    rows = [
        {
            "id": made.id,
            "title": made.title,
            "message": made.message.partition("\n")[2].strip(),
            "date": iso(made.time),
            "authors": [{"user": made.author or "local"}],
        }
        for made in call.registry.history(repo, call.commit(repo))
    ]
    return paged(call, rows, PAGE)


def create_tag(call: Call) -> Response:
    """POST /api/models/{id}/tag/{rev}: 409 when there is one of this name."""
    repo = call.writable()
    name = call.seen.details["tag"] = call.text(call.json(), "tag")
    if name in call.registry.refs(repo).tags:
        raise Refusal(409, f"Tag reference exists already: {name}")
    call.registry.tag(repo, name, call.commit(repo))
    return JSONResponse({"name": name})


def delete_tag(call: Call) -> Response:
    """DELETE /api/models/{id}/tag/{tag}."""
    repo = call.writable()
    name = call.seen.details["tag"] = call.part("rev")
    if name not in call.registry.refs(repo).tags:
        raise Refusal(404, f"Tag not found: {name}", "RevisionNotFound")
    call.registry.delete_tag(repo, name)
    return JSONResponse({})


def create_branch(call: Call) -> Response:
    """POST /api/models/{id}/branch/{branch} {startingPoint?}."""
    repo = call.writable()
    start = call.json().get("startingPoint")
    commit = call.commit(repo, start if isinstance(start, str) else "main")
    call.seen.details["branch"] = call.part("rev")
    call.registry.branch(repo, call.part("rev"), commit)
    return JSONResponse({"name": call.part("rev")})


def delete_branch(call: Call) -> Response:
    """DELETE /api/models/{id}/branch/{branch}."""
    repo = call.writable()
    name = call.seen.details["branch"] = call.part("rev")
    if name not in call.registry.refs(repo).branches:
        raise Refusal(404, f"Branch not found: {name}", "RevisionNotFound")
    call.registry.delete_branch(repo, name)
    return JSONResponse({})


def squash(call: Call) -> Response:
    """POST /api/models/{id}/super-squash/{branch}."""
    repo = call.writable()
    branch = call.seen.details["branch"] = call.part("rev")
    if branch not in call.registry.refs(repo).branches:
        raise Refusal(404, f"Branch not found: {branch}", "RevisionNotFound")
    message = call.json().get("message")
    title = message if isinstance(message, str) and message else f"Super-squash branch '{branch}'"
    call.registry.squash(repo, branch, title, call.author)
    return JSONResponse({})
