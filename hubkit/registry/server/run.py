"""Making and running the server; the imports of its libraries happen here, when it is wanted."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hubkit.compat.uvicorn import impatient
from hubkit.errors import USAGE, HubkitError
from hubkit.registry.server.auth import Account, Door, Known, read_tokens
from hubkit.registry.server.users import UsersFile

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

    from hubkit.registry.server.calls import Limits, Server

HEAD_SECONDS = 20.0
"""How long the head of a request may take; what never ends one must not keep others out."""
STALLED_SECONDS = 120.0
"""How long a client may take nothing of its answer."""
SWITCH_SECONDS = 0.0005
"""How long a thread that computes may keep the one that answers waiting, each time: a tenth of what Python has."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build_app(
    root: Path,
    *,
    tokens: Mapping[str, str | Account] | None = None,
    users: Callable[[], Known] | None = None,
    limits: Limits | None = None,
    public_url: str | None = None,
    read_only: bool = False,
    quota: int | None = None,
    audit: Path | None = None,
) -> Starlette:
    """The Hub's protocol in front of the directory registry at `root`, as an ASGI application.

    Args:
        root: the registry's directory; need not exist.
        tokens: token to user name, ``user:role`` (read, write, admin) or `Account`. None: everybody may do everything.
        users: instead of `tokens`: gives those who are known at that moment, see `users.UsersFile`.
        limits: sizes a client may send.
        public_url: ``https://host`` under which clients reach it, when a proxy stands in front.
        read_only: nothing can be changed.
        quota: bytes that all repositories together may take; those of namespaces come with `users`.
        audit: the file that events are logged to, see `watch.Audit`.

    Raises:
        HubkitError: HK-EXTRA when the extra `serve` is not installed; HK-IO for the log.
    """
    try:
        from hubkit.registry.server.app import make_app
        from hubkit.registry.server.calls import Limits, Server
        from hubkit.registry.server.watch import Audit, State
    except ImportError as error:
        raise _extra(error) from None
    from hubkit.registry.directory.directory import DirectoryRegistry
    from hubkit.registry.directory.quota import Quotas
    from hubkit.registry.directory.usage import Usage

    address = public_url.rstrip("/") if public_url else None
    registry, door = DirectoryRegistry(root), Door(tokens, users)
    quotas = Quotas(Usage(registry.root), quota, lambda: door.known().quotas)
    state = State(audit=Audit(audit) if audit is not None else None)
    return make_app(Server(registry, door, limits or Limits(), quotas, address, read_only, state))


def run_server(
    root: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    tokens_file: Path | None = None,
    tokens: Mapping[str, str | Account] | None = None,
    users_file: Path | None = None,
    read_only: bool = False,
    quota: int | None = None,
    audit: Path | None = None,
    grace: float = 10.0,
    public_url: str | None = None,
    open_to_network: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until interrupted (Ctrl-C, SIGTERM).

    Then nothing new is begun, health says so, and requests under way get some time to finish; a second interruption
    ends the process at once.

    Args:
        root: the registry's directory.
        host: address to listen on.
        port: 0 takes a free one.
        tokens_file: JSON file of tokens, see `auth.read_tokens`.
        tokens: the same, given directly.
        users_file: instead of tokens: who may do what, see `users.read_users`; read again when it changes.
        read_only: nothing can be changed.
        quota: see `build_app`.
        audit: see `build_app`.
        grace: seconds that requests under way have at the end.
        public_url: see `build_app`.
        open_to_network: allow a server without tokens on an address that others reach.
        ready: called with the address, ``http://host:port``, once connections are accepted.

    Raises:
        HubkitError: HK-OPEN-SERVER without tokens beyond loopback; HK-PORT when the address is taken; HK-EXTRA.
    """
    if users_file is not None and (tokens_file is not None or tokens is not None):
        what, fix = "a file of users and one of tokens do not go together", "--users FILE alone"
        raise HubkitError("HK-OPTIONS", what, fix=fix, status=USAGE)
    known = read_tokens(tokens_file) if tokens_file is not None else tokens
    users = UsersFile(users_file) if users_file is not None else None
    if known is None and users is None and host not in LOOPBACK and not open_to_network:
        what, want = "without tokens everybody on the network could write", "users, or a loopback address"
        fix = "--users FILE    (made by: hubkit users FILE --add NAME)    or --open-to-network"
        raise HubkitError("HK-OPEN-SERVER", what, where=host, want=want, fix=fix)
    app = build_app(
        root, tokens=known, users=users, public_url=public_url, read_only=read_only, quota=quota, audit=audit
    )
    server = _stoppable(app, grace)
    _allow_connections()
    listener, pace = _listen(host, port), sys.getswitchinterval()
    try:
        sys.setswitchinterval(SWITCH_SECONDS)
        if ready is not None:
            # the socket accepts already: what connects now waits for the loop
            ready(f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass  # the server has shut down in order by now
    finally:
        sys.setswitchinterval(pace)
        listener.close()


def _stoppable(app: Starlette, grace: float) -> uvicorn.Server:
    """A server of uvicorn that goes on answering what is under way when it is told to end, for `grace` seconds."""
    try:
        import uvicorn
    except ImportError as error:
        raise _extra(error) from None
    served: Server = app.state.server
    state = served.state

    class Stoppable(uvicorn.Server):
        until = 0.0

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            state.stopping, self.until = True, time.monotonic() + grace
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)  # the second one ends the process; a registry bears that

        async def on_tick(self, counter: int) -> bool:
            if state.stopping and time.monotonic() > self.until:
                for connection in list(self.server_state.connections):
                    connection.cut()  # type: ignore[union-attr]
            if state.stopping and (state.under_way == 0 or time.monotonic() > self.until):
                self.should_exit = True
            return await super().on_tick(counter)

    config = uvicorn.Config(
        app,
        http=impatient(HEAD_SECONDS, STALLED_SECONDS),
        log_level="warning",
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    server = Stoppable(config)
    served.connections = lambda: len(server.server_state.connections)
    return server


def _allow_connections() -> None:
    """As many open files, which connections are, as the system lets this process have."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
