"""`login`: which registry is asked, with whose token, and what that may do. Nothing is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import HubkitError
from hubkit.registry.address import HUB
from hubkit.registry.opening import choose, open_registry

SETTINGS_PAGE = f"{HUB}/settings/tokens"


@dataclass(frozen=True, repr=False)
class Login(Shown):
    """Who one is to a registry.

    Args:
        registry: its name, without credentials.
        chosen: what says that it is this one: ``--registry``, ``HUBKIT_REGISTRY``, ``registry`` (the settings file) or
            ``default``.
        source: where the token comes from: an environment variable or a file; None: none is sent.
        user: whose it is; None: a directory asks nobody.
        organizations: of which the user is a member.
        role: of the token: ``read``, ``write``, ``fineGrained``, or what else the server says.
        may: what it may do, in words.
    """

    registry: str
    chosen: str
    source: str | None
    user: str | None
    organizations: tuple[str, ...]
    role: str | None
    may: tuple[str, ...]


@checked
def login(*, registry: str | None = None) -> Login:
    """Ask a registry who the user is to it.

    Args:
        registry: which, if not the default registry.

    Raises:
        HubkitError: ``HK-AUTH`` where a token is needed and there is none, or one that is not accepted, with the way to
            one; what the registry raises.
    """
    from hubkit.registry.hub.huggingface import HuggingFaceRegistry

    place, chosen = open_registry(None, registry), choose(None, registry).source
    if not isinstance(place, HuggingFaceRegistry):
        return Login(place.name, chosen, None, None, (), None, ("what the file system allows",))
    source = place.token_source()
    try:
        found = place.whoami()
    except HubkitError as fault:
        if fault.code != "HK-AUTH":
            raise
        what = "the registry does not accept the token" if source else "no token is set for this registry"
        have = f"a token from {source}" if source else "no token"
        raise HubkitError("HK-AUTH", what, where=place.name, have=have, fix=_way(place.name)) from None
    user = str(found["name"])
    organizations = tuple(_texts(found.get("orgs"), "name"))
    access = _mapping(_mapping(found.get("auth")).get("accessToken"))
    role = str(access["role"]) if isinstance(access.get("role"), str) else None
    return Login(place.name, chosen, source, user, organizations, role, tuple(_may(role, access, user, organizations)))


def _way(name: str) -> str:
    """How one gets a token and where it is put."""
    if name == HUB:
        return f"hf auth login    or set HF_TOKEN to one of {SETTINGS_PAGE}"
    own = f"hubkit config set tokens.{name} VARIABLE, and set that variable"
    return f"ask whoever runs it for a token; set HUBKIT_REGISTRY={name} and HUBKIT_TOKEN    or: {own}"


def _may(role: str | None, access: Mapping[str, Any], user: str, organizations: tuple[str, ...]) -> list[str]:
    """What a token may do, as far as the server says."""
    owners = ", ".join((user, *organizations))
    if role == "read":
        return [f"read what {owners} may read"]
    if role == "write":
        return [f"read and write repositories of {owners}"]
    fine = _mapping(access.get("fineGrained"))
    found = []
    scoped, everywhere = fine.get("scoped"), fine.get("global")
    for scope in scoped if isinstance(scoped, list) else []:
        entity = _mapping(_mapping(scope).get("entity"))
        allowed = _mapping(scope).get("permissions")
        words = ", ".join(map(str, allowed)) if isinstance(allowed, list) and allowed else "nothing"
        found.append(f"{entity.get('type', 'entity')} {entity.get('name', '?')}: {words}")
    found += [f"everywhere: {', '.join(map(str, everywhere))}"] if isinstance(everywhere, list) and everywhere else []
    return found or ["the registry does not say"]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(rows: object, key: str) -> list[str]:
    return [str(_mapping(row)[key]) for row in rows if key in _mapping(row)] if isinstance(rows, list) else []
