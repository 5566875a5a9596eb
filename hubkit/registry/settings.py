"""The user's settings file: which registry is asked, which one for whose repositories, where each one's token is.

``$HUBKIT_CONFIG``, else ``$XDG_CONFIG_HOME/hubkit/config.toml``, else ``~/.config/hubkit/config.toml``::

    registry = "file:///srv/adapters"             # where references go that name none

    [namespaces]
    HuggingFaceTB = "hf"                          # of this owner's repositories

    [tokens]
    "https://hub.acme.example" = "ACME_TOKEN"     # the environment variable with the token for this server

No token stands in it: the file is copied, backed up and put under version control.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubkit.documents.files import read
from hubkit.documents.schema import is_secret
from hubkit.errors import USAGE, HubkitError, nearest
from hubkit.registry.address import check_endpoint, is_repo, origin, without_secrets

FILE = "HUBKIT_CONFIG"
REGISTRY = "HUBKIT_REGISTRY"
HUB_WORDS = ("hf", "hub", "hf://")
"""What stands for the Hugging Face Hub."""
MAX_BYTES = 1 << 20
KEYS = ("registry", "namespaces", "tokens")
PLACES = "hf   https://host   file:///directory   /directory"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,99}")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


@dataclass(frozen=True)
class Settings:
    """What stands in the file; empty where there is none.

    Args:
        path: the file.
        there: whether it is there.
        registry: of references that name none.
        namespaces: owner to the registry of that owner's repositories.
        tokens: origin of a server to the environment variable that holds the token for it.
    """

    path: Path
    there: bool = False
    registry: str | None = None
    namespaces: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def default(self) -> str:
        """The registry of references that name none, where no flag does: the environment's, this one's, the Hub."""
        return os.environ.get(REGISTRY) or self.registry or "hf"

    def variable(self, endpoint: str) -> str | None:
        """The environment variable that holds the token for a server; None where none is named."""
        here = origin(endpoint)
        return next((name for place, name in self.tokens.items() if origin(place) == here), None)


def settings_path() -> Path:
    """Where the file is, or would be; the null device where the user has no home and says nothing else."""
    try:
        if chosen := os.environ.get(FILE):
            return Path(chosen).expanduser()
        above = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
    except RuntimeError:
        return Path(os.devnull)
    return above / "hubkit" / "config.toml"


def read_settings() -> Settings:
    """The user's settings.

    Raises:
        HubkitError: what `parse_settings` raises; ``HK-IO``.
    """
    path = settings_path()
    if str(path) == os.devnull:
        return Settings(path)
    try:
        return parse_settings(read(path, MAX_BYTES), path)
    except FileNotFoundError:
        return Settings(path)


def parse_settings(data: bytes, path: Path) -> Settings:
    """What a file of these bytes says.

    Raises:
        HubkitError: ``HK-CONFIG`` (status 2) with every unknown key, the nearest names, and every wrong value;
            ``HK-SECRET`` where it holds a token.
    """
    try:
        text = data.decode()
        document = tomllib.loads(text)
    except ValueError as error:
        raise _wrong("the settings cannot be read", path, [str(error).splitlines()[0][:200]]) from None
    if is_secret(text) or _TOKEN.search(text):
        raise _secret(f"{path}")
    faults = [_unknown(key) for key in document if key not in KEYS]
    for table in ("namespaces", "tokens"):
        if not isinstance(document.get(table, {}), dict):
            faults.append(f"{table}: a table, [{table}]")
    if faults:
        raise _wrong("the settings are not all known", path, faults)
    rows = [("registry", document["registry"])] if "registry" in document else []
    rows += [(f"{table}.{key}", value) for table in KEYS[1:] for key, value in document.get(table, {}).items()]
    for key, value in rows:
        check_setting(key, value, str(path))
    return Settings(path, True, document.get("registry"), document.get("namespaces", {}), document.get("tokens", {}))


def check_setting(key: str, value: Any, where: str) -> None:
    """Refuse a setting that cannot be.

    Args:
        key: ``registry``, ``namespaces.OWNER`` or ``tokens.ADDRESS``.
        value: a registry, or of a token the name of an environment variable.
        where: the file or flag, for the message.

    Raises:
        HubkitError: ``HK-CONFIG`` (status 2); ``HK-SECRET`` for a token, whose text is not shown.
    """
    table, _, name = key.partition(".")
    if table not in KEYS or bool(name) == (table == "registry"):
        raise _wrong("there is no such setting", where, [_unknown(key)])
    if not isinstance(value, str):
        raise _wrong(f"{key} is text", where, [f"{key}: {type(value).__name__}"])
    if table == "tokens":
        _check_token(key, name, value, where)
        return
    if table == "namespaces" and not is_repo(f"{name}/x"):
        raise _wrong("this is no owner of repositories", where, [key], want="namespaces.OWNER")
    if is_secret(value):
        raise _secret(f"{where}  {key}")
    if value in HUB_WORDS or value.startswith(("/", "~/", "file:///")):
        return
    if value.startswith(("http://", "https://")):
        try:
            check_endpoint(value)
        except HubkitError as fault:
            raise _wrong(fault.what, where, [f"{key}: {without_secrets(value)}"], want=PLACES) from None
        return
    raise _wrong("not a registry", where, [f"{key}: {without_secrets(value)[:200]}"], want=PLACES)


def _check_token(key: str, name: str, value: str, where: str) -> None:
    try:
        sound = check_endpoint(name).count("/") == 2
    except HubkitError:
        sound = False
    if not sound:
        have, want = [without_secrets(key)[:200]], 'tokens."https://host": a server without a path'
        raise _wrong("a token is for a server", where, have, want=want)
    if not _VARIABLE.fullmatch(value) or _TOKEN.search(value):
        raise _secret(f"{where}  {key}")


def _unknown(key: str) -> str:
    near = nearest(key.partition(".")[0], KEYS, 1)
    shown = without_secrets(key)[:100]
    return f"{shown}: unknown" + (f"; did you mean {near[0]}?" if near else "")


def _wrong(what: str, where: Path | str, have: list[str], want: str = "") -> HubkitError:
    want = want or "registry, namespaces.OWNER, tokens.ADDRESS"
    fix = "hubkit config --help"
    return HubkitError("HK-CONFIG", what, where=str(where), want=want, have=have, fix=fix, status=USAGE)


def _secret(where: str) -> HubkitError:
    want = "the name of an environment variable in capitals, e.g. ACME_TOKEN, which holds the token"
    fix = "take the token out, and revoke it if others could read it"
    return HubkitError("HK-SECRET", "settings never hold a token", where=where, want=want, fix=fix, status=USAGE)
