"""Who may do what: bearer tokens of users, their roles and organizations."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from hubkit.errors import HubkitError

ROLES = ("read", "write", "admin")
"""What may be done, from little to much; each holds those before it."""


@dataclass(frozen=True)
class Right:
    """What a user may do with some repositories.

    Args:
        pattern: ``org/name`` or ``org`` for all of its repositories; ``*`` stands for any letters, ``*`` alone for all.
        level: ``read`` sees private ones, ``write`` also makes them and changes what is in them, ``admin`` also
            deletes, moves, hides and shows them.
    """

    pattern: str
    level: str

    def covers(self, repo: str) -> bool:
        """Whether it speaks of this repository, ``org/name``."""
        pattern = self.pattern if "/" in self.pattern else f"{self.pattern}/*"
        return self.pattern == "*" or fnmatchcase(repo, pattern)


@dataclass(frozen=True)
class Account:
    """A user behind a token.

    Args:
        user: name; also the namespace that is theirs.
        role: ``read`` sees what is theirs and what is public, ``write`` also changes what is theirs, ``admin`` may
            do both everywhere.
        organizations: further namespaces that are theirs.
        rights: instead of all that where a file of users gives them; the role is the highest of them then.
    """

    user: str
    role: str = "write"
    organizations: tuple[str, ...] = ()
    rights: tuple[Right, ...] | None = None

    def owns(self, repo: str) -> bool:
        """Whether the repository's namespace is theirs, by role and organizations."""
        return self.role == "admin" or repo.split("/")[0] in (self.user, *self.organizations)

    def may(self, level: str, repo: str) -> bool:
        """Whether they may read, write or administer (see `Right`) a repository, whoever may see it."""
        if self.rights is None:
            return self.owns(repo) and (level == "read" or self.role != "read")
        need = ROLES.index(level)
        return any(ROLES.index(one.level) >= need and one.covers(repo) for one in self.rights)

    @property
    def sees_all(self) -> bool:
        """Whether no repository is hidden from them."""
        if self.rights is None:
            return self.role == "admin"
        return any(one.pattern in ("*", "*/*") for one in self.rights)

    def namespaces(self) -> dict[str, str]:
        """Namespaces beside their own in which they have rights, those named in full, with the highest right."""
        if self.rights is None:
            return dict.fromkeys(self.organizations, self.role)
        found: dict[str, str] = {}
        for one in self.rights:
            name = one.pattern.split("/")[0]
            if "*" not in name and name != self.user:
                found[name] = max(found.get(name, "read"), one.level, key=ROLES.index)
        return found


LOCAL = Account("local", "admin")
"""Everybody, on a server without tokens."""


@dataclass(frozen=True)
class Known:
    """Whom a server knows, at one moment.

    Args:
        accounts: by the digest of the token.
        users: everybody, those without a token, too.
        anonymous: whether those without a token may read what is public.
        quotas: namespace -> bytes that may be stored in it.
    """

    accounts: Mapping[bytes, Account]
    users: tuple[Account, ...] = ()
    anonymous: bool = True
    quotas: Mapping[str, int] = field(default_factory=dict)


class Door:
    """Finds the account of a request.

    Args:
        tokens: token to user name (role ``write``), ``user:role`` or `Account`; None: everybody may do everything.
        users: gives whom a file of users names now; instead of `tokens`.
    """

    def __init__(self, tokens: Mapping[str, str | Account] | None, users: Callable[[], Known] | None = None) -> None:
        self.open = tokens is None and users is None
        fixed = Known({digest_of(token): _account(value) for token, value in (tokens or {}).items()})
        self.known: Callable[[], Known] = users or (lambda: fixed)

    def account(self, header: str | None) -> Account | None:
        """The account of an ``Authorization`` header; None is anonymous; HK-AUTH for a token that is unknown.

        A token is looked up by its digest. How long that takes may tell how a digest begins, and nothing about a token:
        whoever guesses cannot choose what the digest of a guess is.
        """
        if self.open:
            return LOCAL
        if not header:
            return None
        scheme, _, token = header.partition(" ")
        found = self.known().accounts.get(digest_of(token.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            raise HubkitError("HK-AUTH", "Invalid credentials in Authorization header")
        return found

    def still(self, user: str, level: str, repo: str) -> bool:
        """Whether a user, by name, has a right now: for an address that was given to them before."""
        return self.open or any(one.user == user and one.may(level, repo) for one in self.known().accounts.values())

    @property
    def sound(self) -> bool:
        """Whether those who are known are those whom the file of users names."""
        return bool(getattr(self.known, "sound", True))

    @property
    def anonymous(self) -> bool:
        """Whether those without a token may read what is public."""
        return self.open or self.known().anonymous


def digest_of(token: str) -> bytes:
    """What is kept of a token.

    A plain sha256, neither slow nor salted: those are for secrets that people choose, which can be tried out. A token
    of 256 random bits cannot, and every request has one looked up.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _account(value: str | Account) -> Account:
    if isinstance(value, Account):
        found = value
    else:
        user, _, role = value.partition(":")
        found = Account(user, role or "write")
    if found.role not in ROLES:
        raise HubkitError("HK-OPTION", "unknown role of a token", have=found.role, want=", ".join(ROLES))
    return found


def read_tokens(path: Path) -> dict[str, Account]:
    """Read a file of tokens: JSON, ``{"<token>": "user" | "user:role" | {"user", "role", "organizations"}}``.

    Raises:
        HubkitError: HK-OPTION; the message never shows a token.
    """
    require_hidden(path)
    try:
        data = json.loads(path.read_bytes())
        if not isinstance(data, dict):
            raise TypeError
        return {token: _account(_parsed(value)) for token, value in data.items()}
    except (OSError, ValueError, TypeError, KeyError):
        raise HubkitError(
            "HK-OPTION",
            "tokens cannot be read",
            where=str(path),
            want='a JSON object {"<token>": {"user": "ana", "role": "write", "organizations": []}}',
        ) from None


def _parsed(value: object) -> str | Account:
    if isinstance(value, dict):
        return Account(str(value["user"]), str(value.get("role", "write")), tuple(value.get("organizations", ())))
    if not isinstance(value, str):
        raise TypeError
    return value


def require_hidden(path: Path) -> None:
    """Refuses a file of tokens that everybody on this machine can read.

    Raises:
        HubkitError: HK-OPTION.
    """
    if os.name == "posix" and path.is_file() and path.stat().st_mode & 0o007:
        what, fix = "everybody on this machine can read the tokens", f"chmod o= {path}"
        raise HubkitError("HK-OPTION", what, where=str(path), fix=fix)
