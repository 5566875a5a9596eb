"""`users`: the file that says who may do what on a registry that `serve` serves, and the tokens of those in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubkit.documents.arguments import checked
from hubkit.documents.shown import Shown
from hubkit.errors import USAGE, HubkitError, nearest


@dataclass(frozen=True, repr=False)
class Member(Shown):
    """One user.

    Args:
        name: also the namespace that is theirs.
        rights: ``acme:write`` and the like.
        tokens: how many tokens are theirs.
    """

    name: str
    rights: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, repr=False)
class Roster(Shown):
    """What a file of users says now.

    Args:
        file: where it is.
        anonymous: whether those without a token may read what is public.
        users: everybody in it, by name.
        quotas: namespace -> bytes that may be stored in it.
        token: of the user who was added or got a new one; it stands nowhere else.
    """

    file: Path
    anonymous: bool
    users: tuple[Member, ...]
    quotas: dict[str, int]
    token: str | None = None


@checked
def users(
    file: Path | str,
    *,
    add: str | None = None,
    rights: Sequence[str] = (),
    renew: str | None = None,
    remove: str | None = None,
) -> Roster:
    """Show a file of users, or change it; a server that runs with it obeys at its next request.

    Args:
        file: TOML, or JSON where its name ends so; begun by the first `add`.
        add: name of a new user, who gets a token.
        rights: of that user: ``NAMESPACE:LEVEL`` or ``NAMESPACE/NAME:LEVEL``, ``*`` for any letters; the levels are
            ``read``, ``write`` and ``admin``. Without any: ``admin`` in the namespace of their own name.
        renew: name of a user who gets a new token; the old ones are no longer good.
        remove: name of a user who goes.

    Raises:
        HubkitError: ``HK-OPTION`` for a file that cannot be read or that everybody can read, ``HK-OPTIONS`` for a wrong
            right or several changes at once, ``HK-EXISTS``, ``HK-NOT-FOUND``, ``HK-NAME``, ``HK-SECRET`` for a token as
            a name, ``HK-BUSY``, ``HK-IO``.
    """
    from hubkit.documents.schema import is_secret
    from hubkit.registry.address import require_repo
    from hubkit.registry.server import users as document

    path = Path(file)
    if sum(name is not None for name in (add, renew, remove)) > 1 or (rights and add is None):
        what, want = "these do not go together", "one of add (with rights), renew, remove"
        raise HubkitError("HK-OPTIONS", what, want=want, status=USAGE)
    token = None
    if add is not None:
        require_repo(f"{add}/x")
        if is_secret(add):
            raise HubkitError(
                "HK-SECRET", "a user's name is wanted, this is a token", fix=f"hubkit users {path} --add NAME"
            )
        chosen = _rights(rights or [f"{add}:admin"])
        with document.editing(path, new=True) as text:
            if add in text.get("users", {}):
                fix = f"hubkit users {path} --renew {add}    gives a new token"
                raise HubkitError("HK-EXISTS", f"there is a user '{add}' already", where=str(path), fix=fix)
            token = document.add(text, add, chosen)
    elif (name := renew or remove) is not None:
        with document.editing(path) as text:
            if name not in text.get("users", {}):
                near = nearest(name, text.get("users", {}))
                raise HubkitError("HK-NOT-FOUND", f"no user '{name}'", where=str(path), have=near)
            if renew is not None:
                token = document.new_token()
                text["users"][name]["token"] = document.stored(token)
            else:
                del text["users"][name]
    return _roster(path, token)


def _rights(texts: Sequence[str]) -> list[str]:
    from hubkit.registry.server.users import right_of

    for text in texts:
        try:
            right_of(text)
        except ValueError as error:
            want = "NAMESPACE:LEVEL, e.g. acme:write, 'lab/exp-*:read', '*:read'; levels: read, write, admin"
            raise HubkitError("HK-OPTIONS", str(error), want=want, status=USAGE) from None
    return list(texts)


def _roster(path: Path, token: str | None) -> Roster:
    from hubkit.registry.server.users import read_users

    known = read_users(path)
    held = [account.user for account in known.accounts.values()]
    rows = [
        Member(one.user, tuple(f"{r.pattern}:{r.level}" for r in one.rights or ()), held.count(one.user))
        for one in sorted(known.users, key=lambda account: account.user)
    ]
    return Roster(path, known.anonymous, tuple(rows), dict(known.quotas), token)
