"""The Hub's HTTP protocol in front of a directory registry, so that existing clients work against it.

`build_app` makes the ASGI application, `run_server` serves it. Needs the extra `serve`; nothing heavy is imported
before one of them is called.
"""

from __future__ import annotations

from hubkit.registry.server.auth import Account, read_tokens
from hubkit.registry.server.run import build_app, run_server

__all__ = ["Account", "build_app", "read_tokens", "run_server"]
