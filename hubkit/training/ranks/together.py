"""A public function as one call of all processes of a launch; a process on its own imports no torch for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from hubkit.training.ranks.launched import launched

P = ParamSpec("P")
T = TypeVar("T")


def together(function: Callable[P, T]) -> Callable[P, T]:
    """`function` as one call of all processes of a launch; where there is no launch it is called as it is.

    Of an exception that ends it in all of them one is told, the others are marked (`hubkit.errors.is_told`).
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        launch = launched()
        if launch is None:
            return function(*args, **kwargs)
        from hubkit.training.ranks.joining import joined

        with joined(launch):
            return function(*args, **kwargs)

    return run
