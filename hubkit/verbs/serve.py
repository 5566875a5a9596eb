"""`serve`: a directory of repositories behind the Hub's HTTP protocol, for `hf`, transformers, PEFT and hubkit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hubkit.documents.arguments import checked


@checked
def serve(
    root: Path | str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokens: Path | str | None = None,
    public_url: str | None = None,
    open_to_network: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted.

    Args:
        root: the directory; made when the first repository is.
        host: address to listen on.
        port: 0 takes a free one.
        tokens: JSON file, token to user; without it everybody may do everything, on loopback only.
        public_url: the address clients use, when a proxy stands in front.
        open_to_network: allow a server without tokens on an address that others reach.
        ready: called with the address once connections are accepted.

    Raises:
        HubkitError: ``HK-EXTRA`` without the extra ``serve``, ``HK-PORT``, ``HK-OPEN-SERVER``, ``HK-OPTION``.
    """
    from hubkit.registry.server import run_server

    run_server(
        Path(root),
        host,
        port,
        tokens_file=None if tokens is None else Path(tokens),
        public_url=public_url,
        open_to_network=open_to_network,
        ready=ready,
    )
