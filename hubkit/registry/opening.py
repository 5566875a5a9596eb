"""The registry that a reference lives in: a directory, a server that speaks the Hub's protocol, or the Hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from hubkit.errors import USAGE, HubkitError
from hubkit.registry.address import HUB, check_endpoint, origin, without_secrets
from hubkit.registry.api import Progress, Registry
from hubkit.registry.reference import Reference
from hubkit.registry.settings import HUB_WORDS, REGISTRY, Settings, read_settings

_PATHS = ("/", "./", "../", "~/")
_HERE = ("localhost", "127.", "[::1]")


@dataclass(frozen=True)
class Where:
    """Where what a command names is looked for: one value, made at the door of a verb and handed down whole.

    Args:
        registry: the one of references that name none; None: the default registry.
        offline: use only what was pulled before.
        progress: of every pull.
        allow_moved: take tags that meant other commits when they were last pulled.
    """

    registry: str | None = None
    offline: bool = False
    progress: Progress | None = None
    allow_moved: bool = False

    def open(self, reference: Reference) -> Registry:
        """The registry that `reference` is in; see `open_registry`."""
        return open_registry(reference, self.registry)


def mirrors() -> tuple[Registry, ...]:
    """The registries of ``HUBKIT_MIRRORS``, by commas or spaces apart: where else a locked digest is looked for.

    Raises:
        HubkitError: ``HK-REFERENCE`` for text that names no registry.
    """
    words = os.environ.get("HUBKIT_MIRRORS", "").replace(",", " ").split()
    return tuple(open_named(word) for word in words)


@dataclass(frozen=True)
class Choice:
    """Which registry is meant, and who said so.

    Args:
        place: ``hf``, the address of a server, ``file:///directory`` or a directory's path.
        source: ``the reference``, ``--registry``, ``namespaces.OWNER``, ``HUBKIT_REGISTRY``, ``registry`` (of the
            settings file) or ``default``.
    """

    place: str
    source: str


def choose(reference: Reference | None = None, registry: str | None = None, settings: Settings | None = None) -> Choice:
    """Which registry a reference is in. What says it most exactly is obeyed:

    1. the reference itself, where it has a scheme;
    2. `registry`, which was typed for this one command (``--registry``);
    3. the settings file, for this owner (``namespaces``): more special than what is said for all references;
    4. ``HUBKIT_REGISTRY``; 5. the settings file, for all (``registry``); 6. the Hugging Face Hub.

    Args:
        reference: a parsed reference of kind ``repo``, or None for the default registry.
        registry: ``hf``, the address of a server, ``file:///directory`` or a directory's path.
        settings: read already.
    """
    if reference is not None and reference.scheme is not None:
        places = {"hub": "hf", "file": f"file://{quote(reference.endpoint or '/')}"}
        return Choice(places.get(reference.scheme, reference.endpoint or ""), "the reference")
    if registry:
        return Choice(registry, "--registry")
    settings = settings or read_settings()
    owner = (reference.repo or "").partition("/")[0] if reference is not None else ""
    if owner in settings.namespaces:
        return Choice(settings.namespaces[owner], f"namespaces.{owner}")
    if chosen := os.environ.get(REGISTRY):
        return Choice(chosen, REGISTRY)
    return Choice(settings.registry, "registry") if settings.registry else Choice("hf", "default")


def open_registry(reference: Reference | None = None, registry: str | None = None) -> Registry:
    """The registry of a reference, see `choose`.

    Args:
        reference: a parsed reference of kind ``repo``, or None for the default registry.
        registry: ``hf``, the address of a server, ``file:///directory`` or a directory's path (``--registry``).

    Raises:
        HubkitError: ``HK-REFERENCE`` when the text names no registry; ``HK-CONFIG`` for a settings file that is wrong.
    """
    return _open(choose(reference, registry), registry)


def open_named(text: str) -> Registry:
    """A registry that is named beside the default one, e.g. to copy to; ``HUBKIT_TOKEN`` is for the default one alone.

    Raises:
        HubkitError: as `open_registry`.
    """
    return _open(Choice(text, "the command"), None)


def _open(choice: Choice, registry: str | None) -> Registry:
    """The registry that was chosen.

    ``HUBKIT_TOKEN`` is for one server, the configured one; where none is, for that of ``--registry``: a reference may
    come from a stranger's recipe, and one token is not meant for several servers. A server for which the settings name
    a variable gets that token, and no other.
    """
    text = choice.place
    if text not in HUB_WORDS and not text.startswith(("http://", "https://")):
        return _directory(text)
    from hubkit.registry.hub.huggingface import HuggingFaceRegistry

    settings = read_settings()
    configured = settings.default
    default = configured if configured.startswith(("http://", "https://")) else registry or configured
    trusted = text == default or ("://" in text and "://" in default and origin(text) == origin(default))
    endpoint = check_endpoint(os.environ.get("HF_ENDPOINT") or HUB if text in HUB_WORDS else text)
    variable = settings.variable(endpoint)
    token = os.environ.get(variable, "") if variable else None
    return HuggingFaceRegistry(endpoint, token=token, trusted=trusted, source=variable or "")


def _directory(text: str) -> Registry:
    """The directory that a text without a server's address names; it is made by the first push, if it is one's own word
    for a path: a server's name whose ``https://`` was forgotten must not become a folder."""
    from hubkit.registry.directory.directory import DirectoryRegistry

    path = None
    if text.startswith("file://"):
        rest = text.removeprefix("file://").removeprefix("localhost")
        path = Path(unquote(rest)) if rest.startswith("/") else None
    elif "://" not in text and (text in (".", "..") or text.startswith(_PATHS) or Path(text).is_dir()):
        path = Path(text).expanduser()
    if path is None or (path.exists() and not path.is_dir()):
        shown = without_secrets(text)
        scheme = "http" if shown.startswith(_HERE) else "https"
        fix = "" if "://" in text or path is not None else f"{scheme}://{shown}    or, for a directory, ./{shown}"
        what, want = "not a registry", "hf   https://host   file:///directory   ./directory"
        raise HubkitError("HK-REFERENCE", what, want=want, have=shown, fix=fix, status=USAGE)
    return DirectoryRegistry(path)
