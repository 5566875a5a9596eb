"""Names of repositories and addresses of servers: what is one, whose it is, and how it is shown without secrets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from hubkit.errors import USAGE, HubkitError

HUB = "https://huggingface.co"
FORMS = (
    "./dir   org/name   org/name@v1.2.0   org/name@^1.2   org/name@<commit>   org/name@<revision>:<folder>",
    "hf://org/name@v1.2.0   https://host/org/name@v1.2.0   file:///directory/org/name@v1.2.0",
)
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


def check_repo(repo: str, whole: str = "") -> str:
    """`repo` itself when it is ``org/name`` by the Hub's rules.

    Raises:
        HubkitError: ``HK-REFERENCE``.
    """
    if not is_repo(repo):
        raise refused("not a repository name: two parts of letters, digits, '-', '_' and '.'", whole or repo)
    return repo


def is_repo(text: str) -> bool:
    """Whether `text` is ``org/name`` by the Hub's rules."""
    parts = text.split("/")
    sound = len(parts) == 2 and all(_SEGMENT.fullmatch(p) and "--" not in p and ".." not in p for p in parts)
    return sound and not text.endswith((".git", ".lock"))


def require_repo(repo: str, where: str = "") -> None:
    """Refuses what is not ``org/name`` by the Hub's rules before a registry makes a path or an address of it.

    Args:
        where: the registry, for the message.

    Raises:
        HubkitError: ``HK-NAME``.
    """
    if not is_repo(repo):
        want = "org/name of letters, digits, '-', '_', '.'; no '--' or '..', none of '-.', '.git', '.lock' at an end"
        raise HubkitError("HK-NAME", "not a repository name", where=where, want=want, have=repo[:200])


def check_endpoint(url: str) -> str:
    """The address of a server, without a trailing slash.

    Raises:
        HubkitError: ``HK-REFERENCE`` when it is not http(s), has no host, or carries a user name, password or query.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise refused("not an address", url) from None
    if "@" in parts.netloc:
        raise refused("an address with a user name, password or token is refused", url, fix="set HUBKIT_TOKEN")
    if parts.scheme not in ("http", "https") or not host or port == 0 or parts.query or parts.fragment:
        raise refused("not the address of a registry", url)
    return url.rstrip("/")


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address, defaults filled in: what decides who may see a token."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)


def without_secrets(text: str) -> str:
    """An address without user name, password, query and fragment: any of them may be a token."""
    return re.sub(r"[?#].*", "?<hidden>", re.sub(r"//[^/?#]*@", "//<hidden>@", text), flags=re.DOTALL)


def refused(
    what: str, text: str, *, want: Sequence[str] = FORMS, have: Sequence[str] = (), fix: str = ""
) -> HubkitError:
    shown = without_secrets(text)[:300] or "(nothing)"
    return HubkitError("HK-REFERENCE", what, want=want, have=have or shown, fix=fix, status=USAGE)
