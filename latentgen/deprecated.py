"""Old names, which work for one release with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn the caller of the function that calls this: `old` is now `new`."""
    message = f"{old} is now called {new}; the old name stops working in the next release"
    warnings.warn(message, FutureWarning, stacklevel=stacklevel + 1)


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Accept keyword arguments by their old names too: `renamed_arguments(old="new")`.

    Raises:
        TypeError: when the function is called with an argument under both of its names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def with_old_names(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{old} is now called {new}; pass one of them, not both")
                warn_renamed(f"the argument {old}", new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return with_old_names

    return decorate
