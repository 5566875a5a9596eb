"""The registry that a reference lives in: a directory, a server that speaks the Hub's protocol, or the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote

from hubkit.errors import USAGE, HubkitError
from hubkit.registry.address import check_endpoint, origin, without_secrets
from hubkit.registry.api import Registry
from hubkit.registry.reference import Reference


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
        from hubkit.registry.hub.huggingface import HuggingFaceRegistry

        endpoint = None if text in ("hf", "hub", "hf://") else check_endpoint(text)
        return HuggingFaceRegistry(endpoint, trusted=trusted)
    from hubkit.registry.directory.directory import DirectoryRegistry

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
