"""Who may do what: bearer tokens of users, their roles and organizations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hubkit.errors import HubkitError

ROLES = ("read", "write", "admin")


@dataclass(frozen=True)
class Account:
    """A user behind a token.

    Args:
        user: name; also the namespace that is theirs.
        role: ``read`` sees what is theirs and what is public, ``write`` also changes what is theirs, ``admin`` may
            do both everywhere.
        organizations: further namespaces that are theirs.
    """

    user: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    def owns(self, repo: str) -> bool:
        """Whether the repository's namespace is theirs."""
        return self.role == "admin" or repo.split("/")[0] in (self.user, *self.organizations)


LOCAL = Account("local", "admin")
"""Everybody, on a server without tokens."""


class Door:
    """Finds the account of a request.

    Args:
        tokens: token to user name (role ``write``), ``user:role`` or `Account`; None: everybody may do everything.
    """

    def __init__(self, tokens: Mapping[str, str | Account] | None) -> None:
        self.open = tokens is None
        # looked up by hash: the time of the look-up tells nothing about the token
        self._accounts = {_hash(token): _account(value) for token, value in (tokens or {}).items()}

    def account(self, header: str | None) -> Account | None:
        """The account of an ``Authorization`` header; None is anonymous; HK-AUTH for a token that is unknown."""
        if self.open:
            return LOCAL
        if not header:
            return None
        scheme, _, token = header.partition(" ")
        found = self._accounts.get(_hash(token.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            raise HubkitError("HK-AUTH", "Invalid credentials in Authorization header")
        return found


def _hash(token: str) -> bytes:
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
