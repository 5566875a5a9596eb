"""Making and running the server; the imports of its libraries happen here, when it is wanted."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hubkit.errors import HubkitError
from hubkit.registry.server.auth import Account, Door, read_tokens

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from hubkit.registry.server.calls import Limits

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build_app(
    root: Path,
    *,
    tokens: Mapping[str, str | Account] | None = None,
    limits: Limits | None = None,
    public_url: str | None = None,
) -> Starlette:
    """The Hub's protocol in front of the directory registry at `root`, as an ASGI application.

    Args:
        root: the registry's directory; need not exist.
        tokens: token to user name, ``user:role`` (read, write, admin) or `Account`. None: everybody may do everything.
        limits: sizes a client may send.
        public_url: ``https://host`` under which clients reach it, when a proxy stands in front.

    Raises:
        HubkitError: HK-EXTRA when the extra `serve` is not installed.
    """
    try:
        from hubkit.registry.server.app import make_app
        from hubkit.registry.server.calls import Limits, Server
    except ImportError as error:
        raise _extra(error) from None
    from hubkit.registry.directory.directory import DirectoryRegistry

    address = public_url.rstrip("/") if public_url else None
    return make_app(Server(DirectoryRegistry(root), Door(tokens), limits or Limits(), address))


def run_server(
    root: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    tokens_file: Path | None = None,
    tokens: Mapping[str, str | Account] | None = None,
    public_url: str | None = None,
    open_to_network: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted (Ctrl-C, SIGTERM); running requests get ten seconds to finish.

    Args:
        root: the registry's directory.
        host: address to listen on.
        port: 0 takes a free one.
        tokens_file: JSON file of tokens, see `auth.read_tokens`.
        tokens: the same, given directly.
        public_url: see `build_app`.
        open_to_network: allow a server without tokens on an address that others reach.
        ready: called with the address, ``http://host:port``, once connections are accepted.

    Raises:
        HubkitError: HK-OPEN-SERVER without tokens beyond loopback; HK-PORT when the address is taken; HK-EXTRA.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise _extra(error) from None
    known = read_tokens(tokens_file) if tokens_file is not None else tokens
    if known is None and host not in LOOPBACK and not open_to_network:
        raise HubkitError(
            "HK-OPEN-SERVER",
            "without tokens everybody on the network could write",
            where=host,
            want="tokens, or a loopback address",
            fix="give a tokens file, or --open-to-network",
        )
    app = build_app(root, tokens=known, public_url=public_url)
    listener = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", server_header=False, timeout_graceful_shutdown=10
    )
    server = uvicorn.Server(config)
    if ready is not None:
        # the socket accepts already: what connects now waits for the loop
        ready(f"http://{shown}:{listener.getsockname()[1]}")
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # the server has shut down in order by now
    finally:
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections inherit it
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise HubkitError(
            "HK-PORT", "cannot listen", where=f"{host}:{port}", have=error.strerror or str(error), fix="--port 0"
        ) from None
    return listener


def _extra(error: ImportError) -> HubkitError:
    return HubkitError(
        "HK-EXTRA", "the server needs more packages", have=str(error), fix="pip install 'hubkit-adapters[serve]'"
    )
