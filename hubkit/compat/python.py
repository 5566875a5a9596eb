"""Insides of Python's own library, as they are from 3.11 to 3.14."""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
from collections.abc import Iterable
from typing import IO, Any, NoReturn


def parsed_expression(text: str) -> list[tuple[Any, Any]]:
    """A regular expression taken apart: (operator, argument), bodies of groups and repetitions in the arguments.

    ``re._parser``: ``sre_parse`` was its public name and is deprecated since 3.11, without another one.

    Raises:
        re.error: when it is not valid.
    """
    found: list[tuple[Any, Any]] = list(re._parser.parse(text))  # type: ignore[attr-defined]
    return found


def leave(status: int, streams: Iterable[IO[str]]) -> NoReturn:
    """Ends the process as ``sys.exit`` does, all but taking its modules apart, which takes half a second with torch.

    ``atexit._run_exitfuncs`` and then ``os._exit`` is how ``multiprocessing.popen_fork`` ends a child; there is no
    public name for running those functions. The `streams` are flushed first. While another thread runs, or a stream
    refuses what it holds, it is ``sys.exit``.
    """
    if threading.active_count() == 1:
        atexit._run_exitfuncs()
        try:
            for stream in streams:
                stream.flush()
        except (OSError, ValueError):
            sys.exit(status)
        os._exit(status)
    sys.exit(status)
