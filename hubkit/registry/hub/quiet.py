"""Keeping a client library silent while it works for us, whatever number of threads it works in."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Settings:
    lock = threading.Lock()
    depth = 0
    level = logging.WARNING
    bars = False


@contextmanager
def silence(utils: Any) -> Iterator[None]:
    """No progress bars and no log lines (they carry a server's text); the client's settings come back afterwards.

    Args:
        utils: the client's module with ``are_progress_bars_disabled`` and its fellows.
    """
    log = logging.getLogger("huggingface_hub")
    with _Settings.lock:
        if _Settings.depth == 0:
            _Settings.level, _Settings.bars = log.level, not utils.are_progress_bars_disabled()
            log.setLevel(logging.CRITICAL)
            if _Settings.bars:
                utils.disable_progress_bars()
        _Settings.depth += 1
    try:
        yield
    finally:
        with _Settings.lock:
            _Settings.depth -= 1
            if _Settings.depth == 0:
                log.setLevel(_Settings.level)
                if _Settings.bars:
                    utils.enable_progress_bars()
