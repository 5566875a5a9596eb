"""Repositories: who am I, create, delete, move, settings, what there is."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from hubkit.errors import HubkitError
from hubkit.registry.directory.history import FileTree
from hubkit.registry.server.calls import Call, Refusal, iso, paged, window
from hubkit.registry.server.cards import card_of, tags_of
from hubkit.registry.server.tree import file_row

PAGE = 1000


def whoami(call: Call) -> Response:
    """GET /api/whoami-v2."""
    account = call.account
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    role = "read" if account.role == "read" else "write"
    return JSONResponse(
        {
            "type": "user",
            "id": account.user,
            "name": account.user,
            "fullname": account.user,
            "isPro": False,
            "orgs": [
                {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": level}
                for name, level in account.namespaces().items()
            ],
            "auth": {"type": "access_token", "accessToken": {"displayName": "hubkit", "role": role}},
        }
    )


def _named(call: Call) -> str:
    data = call.json()
    if data.get("type") not in (None, "model"):
        raise Refusal(400, f"This server holds models only, not type '{data['type']}'")
    name = call.text(data, "name")
    organization = data.get("organization")
    if organization is None and "/" in name:
        return name
    if organization is None:
        organization = call.account.user if call.account is not None else ""
    return f"{organization}/{name}"


def create(call: Call) -> Response:
    """POST /api/repos/create."""
    repo, data = _named(call), call.json()
    call.seen.details["repo"] = repo
    call.require(repo)
    visibility = data.get("visibility")
    if visibility not in (None, "public", "private"):
        raise Refusal(400, f"Unknown visibility '{visibility}'")
    private = visibility == "private" or data.get("private") is True
    made = call.registry.create(repo, private=private)
    body = {"url": f"{call.origin}/{repo}", "name": repo, "id": repo}
    if not made:
        message = "You already created this model repo"
        return JSONResponse({**body, "error": message}, 409, {"X-Error-Message": message})
    return JSONResponse(body)


def _existing(call: Call, repo: str) -> None:
    call.seen.details["repo"] = repo
    try:
        seen = call.registry.exists(repo) and call.sees(repo)
    except HubkitError:
        seen = False
    if not seen:
        raise call.hidden()
    call.require(repo, "admin")


def delete(call: Call) -> Response:
    """DELETE /api/repos/delete."""
    repo = _named(call)
    _existing(call, repo)
    call.registry.delete(repo)
    return JSONResponse({})


def move(call: Call) -> Response:
    """POST /api/repos/move."""
    data = call.json()
    source, target = call.text(data, "fromRepo"), call.text(data, "toRepo")
    call.seen.details["to"] = target
    _existing(call, source)
    call.require(target)
    call.registry.move(source, target)
    return JSONResponse({"url": f"{call.origin}/{target}"})


def settings(call: Call) -> Response:
    """PUT /api/models/{id}/settings: visibility; there is no gating here."""
    repo, data = call.writable("admin"), call.json()
    if data.get("gated") not in (None, False):
        raise Refusal(400, "This server has no gated repositories")
    visibility = data.get("visibility")
    if visibility is not None or isinstance(data.get("private"), bool):
        if visibility not in (None, "public", "private"):
            raise Refusal(400, f"Unknown visibility '{visibility}'")
        call.registry.set_private(repo, visibility == "private" or data.get("private") is True)
    return JSONResponse({"visibility": "private" if call.registry.private(repo) else "public", "gated": False})


def describe(call: Call, repo: str, commit: str, tree: FileTree, blobs: bool) -> dict[str, Any]:
    """The Hub's description of a repository at a commit."""
    card = card_of(call.registry, repo, tree)
    library = card.get("library_name")
    head = call.registry.one(repo, commit)
    siblings: list[dict[str, Any]] = []
    for path, entry in tree.items():
        row = file_row(path, entry)
        extra = {"size": entry.size, "blobId": entry.oid, **({"lfs": row["lfs"]} if entry.large else {})}
        siblings.append({"rfilename": path, **(extra if blobs else {})})
    return {
        "_id": repo,
        "id": repo,
        "modelId": repo,
        "author": repo.split("/")[0],
        "sha": commit,
        "private": call.registry.private(repo),
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(card, tree),
        "cardData": card or None,
        "siblings": siblings,
        "lastModified": iso(head.time),
        "createdAt": iso(call.registry.created(repo)),
        "usedStorage": sum({e.sha256: e.size for e in tree.values()}.values()),
        **({"library_name": library} if isinstance(library, str) else {}),
        **({"pipeline_tag": card["pipeline_tag"]} if isinstance(card.get("pipeline_tag"), str) else {}),
    }


def info(call: Call) -> Response:
    """GET /api/models/{id}[/revision/{rev}]."""
    repo = call.readable()
    commit = call.commit(repo)
    found = describe(call, repo, commit, call.registry.tree(repo, commit), call.flag("blobs"))
    return JSONResponse(_expanded(call, found))


def _expanded(call: Call, found: dict[str, Any]) -> dict[str, Any]:
    wanted = call.request.query_params.getlist("expand") + call.request.query_params.getlist("expand[]")
    if not wanted:
        return found
    return {k: v for k, v in found.items() if k in ("_id", "id", "modelId", *wanted)}


def listing(call: Call) -> Response:
    """GET /api/models: `author`, `search` (all words, in the name), `filter` (all tags), `sort`, pages."""
    params = call.request.query_params
    words = params.get("search", "").casefold().split()
    wanted = {t for value in params.getlist("filter") for t in value.split(",") if t}
    wanted |= {params["pipeline_tag"]} if "pipeline_tag" in params else set()
    full = call.flag("full") or bool(params.getlist("expand"))
    key, rows = params.get("sort", ""), list[dict[str, Any]]()
    enough = None if key else sum(window(call, PAGE))
    for repo in call.registry.repos(params.get("author") or None):
        if not all(w in repo.casefold() for w in words) or not call.sees(repo):
            continue
        commit = call.registry.resolve(repo)
        row = describe(call, repo, commit, call.registry.tree(repo, commit), False)
        if not wanted <= {*row["tags"], row.get("pipeline_tag"), row.get("library_name")}:
            continue
        if not full:
            row = {k: v for k, v in row.items() if k not in ("siblings", "cardData", "usedStorage")}
        elif not params.getlist("expand"):
            row.pop("usedStorage")
        rows.append(_expanded(call, row))
        if enough is not None and len(rows) > enough:
            break  # in the order of their names, this page is full and there is a next one
    if key in ("lastModified", "createdAt"):
        rows.sort(key=lambda row: str(row.get(key, "")), reverse=True)
    return paged(call, rows, PAGE)
