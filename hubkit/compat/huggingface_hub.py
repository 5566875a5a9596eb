"""Insides of huggingface_hub, as they are from 0.36 to 2.4: on which HTTP library it is built, and what it raises.

Its session, headers and progress bars are public, under names that it exports but does not say to type checkers that it
does (`helpers`). That the session is of requests in 0.x and of httpx from 1 on is said nowhere in a form that a program
could ask. It is imported when a function needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hubkit.compat.silence import Silence


def helpers() -> Any:
    """``huggingface_hub.utils``: `get_session`, `build_hf_headers` and the switches of progress bars."""
    from huggingface_hub import utils

    return utils


@contextmanager
def streamed(url: str, headers: Mapping[str, str], connect: float, read: float) -> Iterator[Any]:
    """The answer to one GET by the client's session (the user's proxies and certificates), its body not read yet.

    Args:
        connect, read: seconds to wait for a connection, and for the next bytes.
    """
    session = helpers().get_session()
    if callable(getattr(session, "stream", None)):  # httpx; requests has a flag of this name
        limits = (connect, read, read, connect)  # connect, read, write, free connection
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=limits) as response:
            yield response
    else:
        with session.get(url, headers=headers, stream=True, timeout=(connect, read)) as response:
            yield response


def pieces(response: Any, size: int) -> Iterator[bytes]:
    """The body of a `streamed` answer, `size` bytes at a time."""
    read = response.iter_bytes if hasattr(response, "iter_bytes") else response.iter_content
    yield from read(size)


def failures() -> tuple[type[BaseException], ...]:
    """The exception classes of the HTTP library below, found as bases of the client's own."""
    from huggingface_hub.errors import HfHubHTTPError

    foreign = [base for base in HfHubHTTPError.__mro__ if base.__module__ != "builtins"]
    return (*foreign, ConnectionError, TimeoutError)


def is_forbidden(error: BaseException) -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbade the request."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)


def is_connect_timeout(error: BaseException) -> bool:
    """Whether nobody was there in time: a class of the HTTP library, called the same in all of them."""
    return type(error).__name__ == "ConnectTimeout"


def is_commit_unread(error: ValueError) -> bool:
    """Whether a commit was made and its answer not understood: clients of 0.x raise this after a commit to any server
    that is not their ``HF_ENDPOINT``, and only its words tell it from others."""
    return str(error).startswith("Unable to retrieve user and repo ID")


def _silenced() -> Callable[[], None]:
    utils, log = helpers(), logging.getLogger("huggingface_hub")
    level, bars = log.level, not utils.are_progress_bars_disabled()
    log.setLevel(logging.CRITICAL)
    if bars:
        utils.disable_progress_bars()

    def restore() -> None:
        log.setLevel(level)
        if bars:
            utils.enable_progress_bars()

    return restore


quiet = Silence(_silenced)
"""``with quiet():`` no progress bars and no log lines, which carry a server's text; the settings come back after it."""
