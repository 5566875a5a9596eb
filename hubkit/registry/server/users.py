"""The file of users: who they are, by the digests of their tokens, what they may do, and what may be stored.

TOML, or JSON of the same shape where the file is called so::

    anonymous = "read"            # or "none": nothing without a token

    [users.ana]
    token = "sha256:<64 hex>"     # or a list of them
    rights = ["ana:admin", "acme:write", "lab/exp-*:read"]

    [quotas]
    acme = "50GB"

A server looks before every request whether it changed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hubkit.documents import drafts, files
from hubkit.documents.arguments import size_of
from hubkit.errors import HubkitError, nearest
from hubkit.registry.address import is_repo
from hubkit.registry.server.auth import ROLES, Account, Known, Right, digest_of, require_hidden

LIMIT = 8 << 20
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_PATTERN = re.compile(r"[A-Za-z0-9_.*-]{1,96}(/[A-Za-z0-9_.*-]{1,96})?")
_HEAD = """\
# Users of a registry: hubkit serve --users reads this again whenever it changes. Of tokens it holds digests only.
# Rights are NAMESPACE:LEVEL or NAMESPACE/NAME:LEVEL with * for any letters; levels are read, write and admin.
anonymous = "read"
"""
_log = logging.getLogger("hubkit.serve")


def new_token() -> str:
    """A token that nobody can guess: 256 random bits. The Hub's JavaScript client takes none that begins otherwise."""
    return f"hf_{secrets.token_hex(32)}"


def right_of(text: str) -> Right:
    """``acme:write`` as a right.

    Raises:
        ValueError: it is none.
    """
    pattern, colon, level = text.rpartition(":")
    if not colon or level not in ROLES or not _PATTERN.fullmatch(pattern):
        near = nearest(level, ROLES, 1) if colon else []
        hint = f" (did you mean {pattern}:{near[0]}?)" if near and level not in ROLES else ""
        raise ValueError(f"'{text}' is no right{hint}")
    return Right(pattern, level)


def read_users(path: Path) -> Known:
    """What a file of users says.

    Raises:
        HubkitError: HK-OPTION with every fault of it; HK-IO.
    """
    require_hidden(path)
    return _known(_document(path), path)


def _document(path: Path) -> dict[str, Any]:
    try:
        text = files.read(path, LIMIT).decode("utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise _refused(path, ["there is no such file"]) from None
    except (ValueError, RecursionError) as error:
        raise _refused(path, [str(error)[:200]]) from None
    if not isinstance(data, dict):
        raise _refused(path, ["it is no table"])
    return data


def _refused(path: Path, faults: list[str]) -> HubkitError:
    want = 'a table [users.NAME] with token = "sha256:..." and rights = ["acme:write"] for each user'
    fix = f"hubkit users {path} --add NAME    makes such a file"
    return HubkitError("HK-OPTION", "users cannot be read", where=str(path), want=want, have=faults, fix=fix)


def _known(data: Mapping[str, Any], path: Path) -> Known:
    faults = [f"unknown key '{key}'" for key in data if key not in ("anonymous", "users", "quotas")]
    anonymous = data.get("anonymous", "read")
    if anonymous not in ("read", "none"):
        faults.append('anonymous must be "read" or "none"')
    accounts: dict[bytes, Account] = {}
    users = []
    for name, row in _table(data, "users", faults).items():
        account, tokens = _user(name, row, faults)
        users.append(account)
        for token in tokens:
            if token in accounts:
                faults.append(f"users.{name}: another user has this token")
            accounts[token] = account
    quotas = {}
    for name, size in _table(data, "quotas", faults).items():
        try:
            quotas[name] = size_of(size if isinstance(size, int | str) else "", f"quotas.{name}")
        except HubkitError:
            faults.append(f"quotas.{name} must be a size such as 50GB")
        if not is_repo(f"{name}/x"):
            faults.append(f"quotas.{name}: no name of a namespace")
    if faults:
        raise _refused(path, faults)
    return Known(accounts, tuple(users), anonymous == "read", quotas)


def _table(data: Mapping[str, Any], key: str, faults: list[str]) -> dict[str, Any]:
    found = data.get(key, {})
    if isinstance(found, dict):
        return found
    faults.append(f"{key} must be a table")
    return {}


def _user(name: str, row: object, faults: list[str]) -> tuple[Account, list[bytes]]:
    """One user, and the digests of their tokens; what is wrong goes to `faults`."""
    where = f"users.{name}"
    if not is_repo(f"{name}/x"):
        faults.append(f"{where}: no name of a namespace")
    if not isinstance(row, dict):
        faults.append(f"{where} must be a table")
        return Account(name), []
    faults += [f"{where}: unknown key '{key}'" for key in row if key not in ("token", "rights")]
    tokens = row.get("token", [])
    tokens = tokens if isinstance(tokens, list) else [tokens]
    if not all(isinstance(one, str) and DIGEST.fullmatch(one) for one in tokens):
        faults.append(f"{where}.token must be sha256: and 64 hex digits, not the token itself")
        tokens = []
    rights = []
    given = row.get("rights")
    for text in given if isinstance(given, list) else [given]:
        try:
            rights.append(right_of(str(text)))
        except ValueError as error:
            faults.append(f"{where}.rights: {error}")
    highest = max((ROLES.index(one.level) for one in rights), default=0)
    account = Account(name, ROLES[highest], rights=tuple(rights))
    return account, [bytes.fromhex(one.removeprefix("sha256:")) for one in tokens]


class UsersFile:
    """A file of users as it is now: read again when it looks otherwise; a damaged one changes nothing.

    Args:
        path: the file.

    Raises:
        HubkitError: see `read_users`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sound = True
        """Whether what counts is what the file says."""
        self._look = self._seen()
        self._known = read_users(path)

    def __call__(self) -> Known:
        """Whom it names, at this moment."""
        look = self._seen()
        if look != self._look:
            self._look = look
            try:
                self._known, self.sound = read_users(self.path), True
                _log.warning("%s: users were read again", self.path)
            except HubkitError as error:
                self.sound = False
                _log.warning("%s: what it said before counts on\n%s", self.path, error.render(20))
        return self._known

    def _seen(self) -> tuple[int, ...]:
        try:
            found = os.stat(self.path)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_mode


# editing


@contextmanager
def editing(path: Path, *, new: bool = False) -> Iterator[Any]:
    """The file as a document that can be changed, comments and all; written whole at the end, if it is sound then.

    Args:
        new: where there is none, begin one.

    Raises:
        HubkitError: HK-OPTION, HK-BUSY, HK-IO; the file is as it was then.
    """
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    busy = HubkitError("HK-BUSY", "another process edits this file", where=str(path), fix="try again")
    with files.refusing(path), drafts.held(path.with_name(f".{path.name}.lock"), busy):
        mode = 0o600
        if path.exists() or not new:
            _known(_document(path), path)
            mode |= path.stat().st_mode & 0o060
            text = path.read_text("utf-8")
        else:
            text = json.dumps({"anonymous": "read"}) if path.suffix == ".json" else _HEAD
        try:
            document = json.loads(text) if path.suffix == ".json" else tomlkit.parse(text)
        except TOMLKitError as error:
            raise _refused(path, [str(error)]) from None
        yield document
        if path.suffix == ".json":
            out = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        else:
            out = tomlkit.dumps(document)
        _known(json.loads(out) if path.suffix == ".json" else tomllib.loads(out), path)
        owner = path.stat() if path.exists() else None
        files.write(path, out.encode(), mode=mode)
        if owner is not None and os.name == "posix":  # the file of whoever serves, also where root edits it
            with suppress(PermissionError):
                os.chown(path, owner.st_uid, owner.st_gid)


def add(document: Any, name: str, rights: Iterable[str]) -> str:
    """Put a user into a document of `editing`; their token, which is nowhere else."""
    import tomlkit

    make: Callable[[], Any] = dict if type(document) is dict else tomlkit.table
    if "users" not in document:
        document["users"] = {} if make is dict else tomlkit.table(is_super_table=True)
    token = new_token()
    row = make()
    row["token"], row["rights"] = stored(token), list(rights)
    document["users"][name] = row
    return token


def stored(token: str) -> str:
    """A token as the file holds it."""
    return f"sha256:{digest_of(token).hex()}"
