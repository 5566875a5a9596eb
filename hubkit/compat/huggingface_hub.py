"""Insides of huggingface_hub, as they are from 0.36 to 2.4: on which HTTP library it is built, and what it raises.

Its session and headers are public, under names that it exports but does not say to type checkers that it
does (`helpers`). That the session is of requests in 0.x and of httpx from 1 on is said nowhere in a form that a program
could ask. It is imported when a function needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_PIECE = 16 << 10


def helpers() -> Any:
    """``huggingface_hub.utils``: `get_session`, `build_hf_headers` and the switches of progress bars."""
    from huggingface_hub import utils

    return utils


@contextmanager
def streamed(
    url: str, headers: Mapping[str, str], connect: float, read: float, verb: str = "GET", content: Any = None
) -> Iterator[Any]:
    """The answer to one request by the client's session (the user's proxies and certificates), its body not read yet.

    Args:
        connect, read: seconds to wait for a connection, and for the next bytes; writing them counts as reading.
        verb: redirects are followed for GET alone.
        content: what is sent: bytes, or an object with ``read`` and ``__len__``.
    """
    session, follow = helpers().get_session(), verb == "GET"
    if callable(getattr(session, "stream", None)):  # httpx; requests has a flag of this name
        limits = (connect, read, read, connect)  # connect, read, write, free connection
        ask = {"headers": dict(headers), "content": content, "follow_redirects": follow, "timeout": limits}
        with session.stream(verb, url, **ask) as response:
            yield response
    else:
        asked = {"headers": dict(headers), "data": content, "allow_redirects": follow, "timeout": (connect, read)}
        with session.request(verb, url, stream=True, **asked) as response:
            yield response


def pieces(response: Any) -> Iterator[bytes]:
    """The body of a `streamed` answer as it comes: requests itself would wait until a piece is full."""
    if hasattr(response, "iter_bytes"):
        yield from response.iter_bytes()
    elif hasattr(response.raw, "read1") and not response.is_redirect:
        from requests.exceptions import ConnectionError as Broken
        from urllib3.exceptions import HTTPError

        try:
            while piece := response.raw.read1(_PIECE, decode_content=True):
                yield piece
        except HTTPError as error:
            raise Broken(error) from error
    else:  # urllib3 1; of a redirect requests has read the body
        yield from response.iter_content(_PIECE)


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


def plain_session(*, direct: bool) -> Any:
    """A session of the HTTP library below the client, without the client's hooks: no token, and offline mode is no
    matter of it. It follows no redirects.

    Args:
        direct: use no proxy, whatever the environment says.
    """
    from importlib import import_module

    from huggingface_hub.errors import HfHubHTTPError

    names = (base.__module__.partition(".")[0] for base in HfHubHTTPError.__mro__)
    library = import_module(next(name for name in names if name not in ("huggingface_hub", "builtins")))
    if hasattr(library, "Client"):  # httpx
        return library.Client(trust_env=not direct)
    made = library.Session()
    made.trust_env = not direct
    return made


@contextmanager
def exchanged(session: Any, method: str, url: str, headers: Mapping[str, str], body: Any, read: float) -> Iterator[Any]:
    """The answer to one request by a `plain_session`, its body not read yet.

    Args:
        body: sent as JSON; None: nothing is sent.
        read: seconds to wait for a connection, and for the next bytes.
    """
    if callable(getattr(session, "stream", None)):
        with session.stream(method, url, headers=headers, json=body, timeout=read) as response:
            yield response
    else:
        options = {"stream": True, "timeout": read, "allow_redirects": False}
        with session.request(method, url, headers=headers, json=body, **options) as response:
            yield response


def dataset_commit(repo: str, revision: str | None) -> str:
    """The commit that a revision of a data set of the Hub is now; its default branch where `revision` is None."""
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(repo, revision=revision).sha)
