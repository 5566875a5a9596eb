"""What a load balancer and a monitor ask: ``/healthz`` and ``/metrics``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from starlette.responses import JSONResponse, PlainTextResponse, Response

from hubkit.errors import HubkitError
from hubkit.registry.directory.layout import Layout
from hubkit.registry.server.calls import Call, Refusal, Server
from hubkit.registry.server.metrics import MEDIA, family

FRESH_SECONDS = 10.0
"""How old may be what `/metrics` says of the store."""


def healthz(call: Call) -> Response:
    """GET /healthz: 200, or 503 while the server ends or its directory cannot be used; needs no token."""
    problem = "" if call.server.state.stopping else _broken(call.server)
    status = "stopping" if call.server.state.stopping else "broken" if problem else "ok"
    body = {"status": status, "read_only": call.server.read_only, **({"reason": problem} if problem else {})}
    return JSONResponse(body, 200 if status == "ok" else 503, {"Cache-Control": "no-store"})


def _broken(server: Server) -> str:
    """Why the directory cannot be served; "" when it can."""
    root = server.registry.root
    try:
        Layout(root).require_registry()  # another one than the registry's own, which remembers that it was sound
    except HubkitError as error:
        return error.what
    if not root.is_dir():
        return "the registry's directory is gone"
    if not os.access(root, os.R_OK | os.X_OK | (0 if server.read_only else os.W_OK)):
        return "the registry's directory may not be used"
    return ""


def metrics(call: Call) -> Response:
    """GET /metrics: for those who may read every repository, for no number tells them anything new.

    Not for everybody on this machine: behind a proxy everybody comes from there.
    """
    if call.account is None:
        raise Refusal(401, "Metrics are for those who are logged in")
    if not call.account.sees_all:
        raise Refusal(403, "Metrics are for those with a right to all repositories, such as *:read")
    server = call.server
    text = "\n".join([*server.state.numbers.render(), *_now(server), *_stored(server)]) + "\n"
    return PlainTextResponse(text, media_type=MEDIA)


def _now(server: Server) -> Iterator[str]:
    state = server.state
    yield from family("hubkit_requests_under_way", "gauge", "Requests being answered.", [({}, state.under_way)])
    yield from family("hubkit_connections", "gauge", "Open connections.", [({}, server.connections())])
    yield from family("hubkit_read_only", "gauge", "1 when nothing can be changed.", [({}, server.read_only)])
    lost = state.audit.lost if state.audit is not None else 0
    yield from family("hubkit_audit_lost_total", "counter", "Events that could not be logged.", [({}, lost)])
    sound = server.door.sound
    yield from family("hubkit_users_sound", "gauge", "0 when the file of users cannot be read.", [({}, sound)])


def _stored(server: Server) -> list[str]:
    """The lines about the store; counting is cheap, but not for every question."""
    with server.counting:
        when, lines = server.counted
        if time.monotonic() - when > FRESH_SECONDS:
            lines = list(_count(server))
            server.counted = time.monotonic(), lines
        return lines


def _count(server: Server) -> Iterator[str]:
    repositories = len(server.registry.repos())
    yield from family("hubkit_repositories", "gauge", "Repositories, private ones too.", [({}, repositories)])
    used = server.quotas.usage.all()
    yield from family("hubkit_objects_bytes", "gauge", "Bytes of all objects.", [({}, sum(used.values()))])
    limits = [({"of": one.whose}, one) for one in server.quotas.limits()]
    yield from family("hubkit_quota_bytes", "gauge", "Bytes allowed.", [(key, one.most) for key, one in limits])
    yield from family("hubkit_quota_used_bytes", "gauge", "Bytes used.", [(key, one.used) for key, one in limits])
