"""References: what people write to name an adapter or a base, and the registry that a reference lives in.

Accepted forms: ``./dir``, ``org/name``, ``org/name@revision``, ``org/name@revision:folder``, ``hf://org/name``,
``https://host/org/name`` and ``file:///directory/org/name``, each of the last three with ``@revision:folder``, too.
A revision is a branch, a tag, a commit, a version (``1.2.0``) or a range of versions (``^1.2``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from hubkit.errors import USAGE, HubkitError
from hubkit.registry.api import Registry
from hubkit.registry.versions import is_range, parse_range, pick_version, resolve_revision

__all__ = ["Reference", "open_registry", "parse_reference", "pick_version", "resolve_revision"]

HUB = "https://huggingface.co"
FORMS = (
    "./dir   org/name   org/name@v1.2.0   org/name@^1.2   org/name@<commit>   org/name@<revision>:<folder>",
    "hf://org/name@v1.2.0   https://host/org/name@v1.2.0   file:///directory/org/name@v1.2.0",
)
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
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


def parse_reference(text: str) -> Reference:
    """Read one reference.

    Args:
        text: as typed; an existing local directory that holds a ``hubkit.json`` counts as a folder without ``./``.

    Raises:
        HubkitError: ``HK-REFERENCE`` (status 2) with the accepted forms. An address with a user name, password or
            query is refused and not repeated in the message: it may hold a token.
    """
    if not text or len(text) > 4096 or not text.isprintable() or text != text.strip():
        raise _refused("not a reference", text)
    if "://" in text:
        return _parse_url(text)
    if text in (".", "..") or text.startswith(("./", "../", "/")) or _is_adapter(text):
        return Reference("folder", path=Path(text))
    repo, revision, folder = _split_tail(text, text)
    if repo.count("/") == 0:
        raise _refused("a repository has an owner", text, fix=f"./{text} for a folder, org/{text} for a repository")
    return Reference("repo", repo=check_repo(repo, text), revision=revision, folder=folder)


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
        raise _refused("unknown kind of address", text)
    if scheme != "file":
        check_endpoint(f"{scheme}://{authority}")
    # the revision is cut off before anything is decoded, so %40 in a directory's name is not a separator
    path, revision, folder = _split_tail(rest[len(authority) :], text)
    if "?" in path or "#" in path:
        raise _refused("an address with a query or a fragment is refused", text)
    parts = path.strip("/").split("/")
    if scheme != "file" and len(parts) > 3 and parts[2] in _BROWSER:
        raise _refused(
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
        raise _refused("a file address names no host", text, fix="file:///directory/org/name")
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
    from hubkit.artifact.names import check_name

    try:
        check_name(folder, where=folder)
    except HubkitError as fault:
        raise _refused("the folder behind ':' is not a plain relative path", whole, have=fault.have) from None
    return name, revision, folder


def _check_revision(revision: str, whole: str) -> None:
    if is_range(revision):
        try:
            parse_range(revision)
        except HubkitError as fault:
            raise _refused(f"not a version range: {revision}", whole, want=fault.want) from None
    elif not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision[-1] in "/.":
        raise _refused("not a revision behind '@'", whole)


def check_repo(repo: str, whole: str = "") -> str:
    """`repo` itself when it is ``org/name`` by the Hub's rules.

    Raises:
        HubkitError: ``HK-REFERENCE``.
    """
    if not is_repo(repo):
        raise _refused("not a repository name: two parts of letters, digits, '-', '_' and '.'", whole or repo)
    return repo


def is_repo(text: str) -> bool:
    """Whether `text` is ``org/name`` by the Hub's rules."""
    parts = text.split("/")
    sound = len(parts) == 2 and all(_SEGMENT.fullmatch(p) and "--" not in p and ".." not in p for p in parts)
    return sound and not text.endswith((".git", ".lock"))


def check_endpoint(url: str) -> str:
    """The address of a server, without a trailing slash.

    Raises:
        HubkitError: ``HK-REFERENCE`` when it is not http(s), has no host, or carries a user name, password or query.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _refused("not an address", url) from None
    if "@" in parts.netloc:
        raise _refused("an address with a user name, password or token is refused", url, fix="set HUBKIT_TOKEN")
    if parts.scheme not in ("http", "https") or not host or port == 0 or parts.query or parts.fragment:
        raise _refused("not the address of a registry", url)
    return url.rstrip("/")


def _refused(
    what: str, text: str, *, want: Sequence[str] = FORMS, have: Sequence[str] = (), fix: str = ""
) -> HubkitError:
    shown = without_secrets(text)[:300] or "(nothing)"
    return HubkitError("HK-REFERENCE", what, want=want, have=have or shown, fix=fix, status=USAGE)


def without_secrets(text: str) -> str:
    """An address without user name, password, query and fragment: any of them may be a token."""
    return re.sub(r"[?#].*", "?<hidden>", re.sub(r"//[^/?#]*@", "//<hidden>@", text), flags=re.DOTALL)


def open_registry(reference: Reference | None = None, registry: str | None = None) -> Registry:
    """The registry of a reference: its own when it names one, else `registry`, ``HUBKIT_REGISTRY``, or the Hub.

    Args:
        reference: a parsed reference of kind ``repo``, or None for the default registry.
        registry: ``hf``, the address of a server, ``file:///directory`` or a directory's path (``--registry``).

    Raises:
        HubkitError: ``HK-REFERENCE`` when the text names no registry.
    """
    chosen = registry or os.environ.get("HUBKIT_REGISTRY") or "hf"
    if reference is None or reference.scheme is None:
        return _open(chosen, trusted=True)
    if reference.scheme == "hub":
        return _open("hf", trusted=True)
    if reference.scheme == "file":
        return _open(f"file://{quote(reference.endpoint or '/')}", trusted=True)
    # a reference may come from a stranger's recipe: only the registry the user configured gets the user's token
    endpoint = reference.endpoint or ""
    return _open(endpoint, trusted="://" in chosen and origin(endpoint) == origin(chosen))


def _open(text: str, *, trusted: bool) -> Registry:
    if text in ("hf", "hub", "hf://") or text.startswith(("http://", "https://")):
        from hubkit.registry.huggingface import HuggingFaceRegistry

        endpoint = None if text in ("hf", "hub", "hf://") else check_endpoint(text)
        return HuggingFaceRegistry(endpoint, trusted=trusted)
    from hubkit.registry.directory import DirectoryRegistry

    if text.startswith("file://"):
        path = text.removeprefix("file://").removeprefix("localhost")
        if path.startswith("/"):
            return DirectoryRegistry(Path(unquote(path)))
    elif "://" not in text and ("/" in text or text in (".", "..") or Path(text).is_dir()):
        return DirectoryRegistry(Path(text))
    raise HubkitError(
        "HK-REFERENCE",
        "not a registry",
        want="hf   https://host   file:///directory   ./directory",
        have=without_secrets(text),
        status=USAGE,
    )


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address, defaults filled in: what decides who may see a token."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
