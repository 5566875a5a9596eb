"""`config`: every setting, its value and who says so; the settings file is written by `set` and `unset` alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.documents.arguments import checked
from hubkit.documents.drafts import locked
from hubkit.documents.files import read, refusing, write
from hubkit.documents.shown import Shown, Table
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.opening import choose, open_registry
from hubkit.registry.settings import (
    HUB_WORDS,
    KEYS,
    MAX_BYTES,
    Settings,
    check_setting,
    parse_settings,
    read_settings,
    settings_path,
)

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

ACTIONS = ("show", "set", "unset")
FILE = "file"
DEFAULT = "default"


@dataclass(frozen=True, repr=False)
class Setting(Shown):
    """One setting.

    Args:
        name: as `config set` takes it, or, of what the environment alone says, for people.
        value: what holds now; of a token only where it comes from, never its text.
        source: the environment variable that says so, ``file``, or ``default``.
    """

    name: str
    value: str
    source: str


@checked
def config(action: str = "show", key: str | None = None, value: str | None = None) -> tuple[Setting, ...]:
    """Show every setting, or change the settings file.

    Args:
        action: ``show``; ``set`` a key to a value; ``unset`` a key. Comments and layout of the file stay.
        key: ``registry``, ``namespaces.OWNER`` or ``tokens.ADDRESS``.
        value: a registry (a directory's path is made absolute), or the environment variable that holds a token.

    Returns:
        every setting as it is afterwards.

    Raises:
        HubkitError: ``HK-OPTIONS`` for another action, or one without what it needs; ``HK-CONFIG`` (status 2) for a key
            that is none, a value that cannot be, a file that is wrong; ``HK-SECRET`` for a token; ``HK-IO``.
    """
    needed = {"show": 0, "set": 2, "unset": 1}.get(action)
    if needed is None or needed != sum(one is not None for one in (key, value)):
        want = "show, set KEY VALUE, unset KEY"
        raise HubkitError(
            "HK-OPTIONS", "no such action", want=want, have=action, fix="hubkit config --help", status=USAGE
        )
    if key is not None:
        _write(key, _absolute(value) if value is not None and not key.startswith("tokens.") else value)
    settings = read_settings()
    return Table([Setting("file", str(settings.path), _file_source(settings)), *_rows(settings)])


def _absolute(value: str) -> str:
    """A folder of the working directory by its whole path: the file is read from everywhere."""
    if value in HUB_WORDS or "://" in value or not (value.startswith(".") or Path(value).is_dir()):
        return value
    return str(Path(value).absolute().resolve())


def _write(key: str, value: str | None) -> None:
    """Change one key in the file; what is there afterwards is read before it takes the old one's place."""
    import tomlkit

    path = settings_path()
    if value is not None or key.partition(".")[0] not in KEYS:
        check_setting(key, value or "hf", str(path))
    if str(path) == os.devnull:
        what, fix = "there is no settings file to write to", "set HUBKIT_CONFIG to the path of one"
        raise HubkitError("HK-CONFIG", what, where=str(path), fix=fix, status=USAGE)
    with refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            try:
                data = read(path, MAX_BYTES)
            except FileNotFoundError:
                data = b""
            parse_settings(data, path)
            document = tomlkit.parse(data.decode())
            _change(document, key, value, path)
            changed = tomlkit.dumps(document).encode()
            parse_settings(changed, path)
            if changed != data:
                write(path, changed)


def _change(document: TOMLDocument, key: str, value: str | None, path: Path) -> None:
    import tomlkit

    name, _, inner = key.partition(".")
    table = document
    if inner:
        if name not in document:
            document[name] = tomlkit.table()
        table = document[name]
        name = inner
    if value is not None:
        table[name] = value
    elif name in table:
        del table[name]
    else:
        known = [one.name for one in _of_file(read_settings())]
        have = ", ".join(known) or "nothing"
        raise HubkitError("HK-CONFIG", f"{key} is not set", where=str(path), have=have, status=USAGE)


def _rows(settings: Settings) -> Iterator[Setting]:
    from hubkit.artifact.identity.digest_cache import home
    from hubkit.registry.hub.deadlines import SETTINGS, Deadlines

    chosen = choose(settings=settings)
    yield Setting("registry", chosen.place, FILE if chosen.source == "registry" else chosen.source)
    yield from (one for one in _of_file(settings) if one.name != "registry")
    yield Setting("token", *_token(settings))
    yield _environment("home", "HUBKIT_HOME", str(home() or ""))
    yield _environment("mirrors", "HUBKIT_MIRRORS", "none")
    yield _environment("offline", "HF_HUB_OFFLINE", "no")
    deadlines = Deadlines.read()
    for kind, (variable, _, what) in SETTINGS.items():
        found = _environment(f"{kind} timeout", variable, "")
        yield Setting(found.name, f"{getattr(deadlines, kind):g} s for {what}", found.source)


def _of_file(settings: Settings) -> list[Setting]:
    """What stands in the file; of a token whether its variable is set."""
    found = [Setting("registry", settings.registry, FILE)] if settings.registry else []
    found += [Setting(f"namespaces.{owner}", place, FILE) for owner, place in settings.namespaces.items()]
    for place, variable in settings.tokens.items():
        state = "" if os.environ.get(variable) else " (not set)"
        found.append(Setting(f"tokens.{place}", f"${variable}{state}", FILE))
    return found


def _token(settings: Settings) -> tuple[str, str]:
    """Where the default registry's token comes from: (for people, the source)."""
    from hubkit.registry.hub.huggingface import HuggingFaceRegistry

    place = open_registry()
    if not isinstance(place, HuggingFaceRegistry):
        return "none is needed: the registry is a directory", DEFAULT
    variable, source = settings.variable(place.endpoint), place.token_source()
    if source is None:
        return ("none" if variable is None else f"none: ${variable} is not set"), FILE if variable else DEFAULT
    return f"from {source}", FILE if variable else source


def _environment(name: str, variable: str, default: str) -> Setting:
    value = os.environ.get(variable)
    return Setting(name, value or default, variable if value else DEFAULT)


def _file_source(settings: Settings) -> str:
    there = "" if settings.there else ", not there"
    return ("HUBKIT_CONFIG" if os.environ.get("HUBKIT_CONFIG") else DEFAULT) + there
