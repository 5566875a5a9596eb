"""References: what people write to name an adapter or a base.

Accepted forms: ``./dir``, ``org/name``, ``org/name@revision``, ``org/name@revision:folder``, ``hf://org/name``,
``https://host/org/name`` and ``file:///directory/org/name``, each of the last three with ``@revision:folder``, too.
A revision is a branch, a tag, a commit, a version (``1.2.0``) or a range of versions (``^1.2``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from hubkit.errors import HubkitError
from hubkit.registry.address import check_endpoint, check_repo, refused
from hubkit.registry.versions import is_range, parse_range

_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]{0,254}")
_BROWSER = ("tree", "blob", "resolve", "raw", "commit", "commits")


@dataclass(frozen=True)
class Reference:
    """A parsed reference; ``str()`` gives it back in its shortest form.

    Args:
        kind: ``folder`` (a local path) or ``repo``.
        path: the folder, for ``folder``.
        scheme: ``hub`` (``hf://``), ``http``, ``file``, or None for the default registry.
        endpoint: the server's address (``http``) or the registry's directory (``file``).
        repo: ``org/name``.
        revision: branch, tag, commit, version or range; None is the default branch.
        folder: folder inside the repository.
    """

    kind: Literal["folder", "repo"]
    path: Path | None = None
    scheme: Literal["hub", "http", "file"] | None = None
    endpoint: str | None = None
    repo: str | None = None
    revision: str | None = None
    folder: str | None = None

    def __str__(self) -> str:
        if self.kind == "folder":
            text = str(self.path)
            return text if text.startswith(("/", "./", "../")) or text in (".", "..") else f"./{text}"
        prefix = {
            None: "",
            "hub": "hf://",
            "http": f"{self.endpoint}/",
            "file": f"file://{quote(self.endpoint or '')}/",
        }
        tail = (f"@{self.revision}" if self.revision else "") + (f":{self.folder}" if self.folder else "")
        return f"{prefix[self.scheme]}{self.repo}{tail}"


def parse_reference(text: Path | str) -> Reference:
    """Read one reference.

    Args:
        text: as typed; an existing local directory that holds a ``hubkit.json`` counts as a folder without ``./``,
            and a `Path` always is one.

    Raises:
        HubkitError: ``HK-REFERENCE`` (status 2) with the accepted forms. An address with a user name, password or
            query is refused and not repeated in the message: it may hold a token.
    """
    if not isinstance(text, str):
        return Reference("folder", path=Path(text))
    if not text or len(text) > 4096 or not text.isprintable() or text != text.strip():
        raise refused("not a reference", text)
    if "://" in text:
        return _parse_url(text)
    if text in (".", "..") or text.startswith(("./", "../", "/")) or _is_adapter(text):
        return Reference("folder", path=Path(text))
    repo, revision, folder = _split_tail(text, text)
    if repo.count("/") != 1 and _is_folder(text):
        raise refused("a folder is named with ./ before it", text, fix=f"./{text}")
    if repo.count("/") == 0:
        raise refused("a repository has an owner", text, fix=f"./{text} for a folder, org/{text} for a repository")
    return Reference("repo", repo=check_repo(repo, text), revision=revision, folder=folder)


def _is_folder(text: str) -> bool:
    try:
        return Path(text).is_dir()
    except OSError:
        return False


def _is_adapter(text: str) -> bool:
    try:
        return (Path(text) / "hubkit.json").is_file()
    except OSError:
        return False  # no path at all, e.g. a segment too long for the file system


def _parse_url(text: str) -> Reference:
    scheme, _, rest = text.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if scheme == "hf":
        repo, revision, folder = _split_tail(rest, text)
        return Reference("repo", scheme="hub", repo=check_repo(repo, text), revision=revision, folder=folder)
    if scheme not in ("http", "https", "file"):
        raise refused("unknown kind of address", text)
    if scheme != "file":
        check_endpoint(f"{scheme}://{authority}")
    # the revision is cut off before anything is decoded, so %40 in a directory's name is not a separator
    path, revision, folder = _split_tail(rest[len(authority) :], text)
    if "?" in path or "#" in path:
        raise refused("an address with a query or a fragment is refused", text)
    parts = path.strip("/").split("/")
    if scheme != "file" and len(parts) > 3 and parts[2] in _BROWSER:
        raise refused(
            "this is the address of a page, not of a repository",
            text,
            fix=f"{scheme}://{authority}/{parts[0]}/{parts[1]}@{parts[3]}",
        )
    repo = check_repo("/".join(parts[-2:]), text)
    above = "/".join(parts[:-2])
    if scheme != "file":
        endpoint = f"{scheme}://{authority.lower()}" + (f"/{above}" if above else "")
        return Reference("repo", scheme="http", endpoint=endpoint, repo=repo, revision=revision, folder=folder)
    if authority not in ("", "localhost"):
        raise refused("a file address names no host", text, fix="file:///directory/org/name")
    return Reference("repo", scheme="file", endpoint=unquote(f"/{above}"), repo=repo, revision=revision, folder=folder)


def _split_tail(text: str, whole: str) -> tuple[str, str | None, str | None]:
    """``name[@revision][:folder]`` taken apart and checked."""
    name, at, tail = text.partition("@")
    revision: str | None = None
    if at:
        revision, colon, folder = tail.partition(":")
        _check_revision(revision, whole)
    else:
        name, colon, folder = text.partition(":")
    if not colon:
        return name, revision, None
    from hubkit.documents.names import check_name

    try:
        check_name(folder, where=folder)
    except HubkitError as fault:
        raise refused("the folder behind ':' is not a plain relative path", whole, have=fault.have) from None
    return name, revision, folder


def _check_revision(revision: str, whole: str) -> None:
    if is_range(revision):
        try:
            parse_range(revision)
        except HubkitError as fault:
            raise refused(f"not a version range: {revision}", whole, want=fault.want) from None
    elif not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision[-1] in "/.":
        raise refused("not a revision behind '@'", whole)
