"""`serve`: a directory of repositories behind the Hub's HTTP protocol, for `hf`, transformers, PEFT and hubkit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.documents.arguments import checked, size_of
from hubkit.errors import USAGE, HubkitError

if TYPE_CHECKING:
    from hubkit.registry.directory.keeping import Checked, Collected


@checked
def serve(
    root: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    users: Path | str | None = None,
    tokens: Path | str | None = None,
    read_only: bool = False,
    quota: int | str | None = None,
    audit: Path | str | None = None,
    grace: float = 10.0,
    public_url: str | None = None,
    open_to_network: bool = False,
    gc: bool = False,
    check: bool = False,
    ready: Callable[[str], None] | None = None,
) -> Collected | Checked | None:
    """Serve until interrupted.

    Args:
        root: the directory: a registry, or empty.
        host: address to listen on.
        port: 0 takes a free one.
        users: the file that says who may do what (see `users`), read again whenever it changes. Without it everybody
            may do everything, on loopback only.
        tokens: instead of `users`: a JSON file, token to user.
        read_only: refuse whatever would change something.
        quota: bytes that may be stored, in all: ``50GB``. Those of namespaces stand in the file of users.
        audit: file to which one line of JSON is appended for each change, each reading of what is private, and each
            refusal.
        grace: seconds that requests under way have once it is told to end.
        public_url: the address clients use, when a proxy stands in front.
        open_to_network: allow a server without tokens on an address that others reach.
        gc: do not serve: remove the content that no commit names, and say how much that was.
        check: do not serve: read every byte, and say what is damaged.
        ready: called with the address once connections are accepted.

    Raises:
        HubkitError: ``HK-NOT-FOUND`` for a directory that is not there, ``HK-REGISTRY`` for one that holds other things
            than a registry; ``HK-EXTRA`` without the extra ``serve``, ``HK-PORT``, ``HK-OPEN-SERVER``, ``HK-OPTION``.
    """
    from hubkit.registry.directory.directory import DirectoryRegistry
    from hubkit.registry.server import run_server

    folder = Path(root)
    if not folder.is_dir():
        what, fix = "there is no such directory", f"check the name; for a new registry: mkdir {folder}"
        if folder.exists():
            what, fix = "this is no directory", "name the directory of a registry"
        raise HubkitError("HK-NOT-FOUND", what, where=str(folder), fix=fix)
    DirectoryRegistry(folder).require_registry()
    if gc and check:
        what, fix = "these do not go together: gc, check", "first --check, then --gc"
        raise HubkitError("HK-OPTIONS", what, fix=fix, status=USAGE)
    if gc:
        return DirectoryRegistry(folder).collect()
    if check:
        return DirectoryRegistry(folder).check()
    run_server(
        folder,
        host,
        port,
        tokens_file=None if tokens is None else Path(tokens),
        users_file=None if users is None else Path(users),
        read_only=read_only,
        quota=None if quota is None else size_of(quota, "--quota"),
        audit=None if audit is None else Path(audit),
        grace=grace,
        public_url=public_url,
        open_to_network=open_to_network,
        ready=ready,
    )
    return None
