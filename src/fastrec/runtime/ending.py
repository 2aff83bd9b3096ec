"""Engines at the interpreter's end.

A daemon thread that comes back from a library's call while the interpreter ends is ended there by
Python, which C++ code takes for an abort of the process. So calls that run are waited for, and
those that would begin wait with their thread.
"""

from __future__ import annotations

import atexit
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# The longest that calls in other threads are waited for.
MOST_S = 10.0
_LOOK_S = 0.001
_CALLS = ("__call__", "_call", "encode", "append", "score", "throughput", "profile")
_watched: set[type] = set()


def watch(engine: type) -> None:
    """Look after the calls of a class of engines, from the first of its instances on."""
    if engine in _watched:
        return
    if not _watched:
        atexit.register(_end)
    _watched.update(base for base in engine.__mro__ if "_call" in dir(base))


def _entries() -> Iterator[tuple[type, str, Any]]:
    for owner in _watched:
        for name in _CALLS:
            if name in vars(owner):
                yield owner, name, vars(owner)[name]


def _end() -> None:
    codes = {function.__code__ for _, _, function in _entries()}
    for owner, name, function in list(_entries()):
        setattr(owner, name, _of_main_thread(function))
    deadline = time.monotonic() + MOST_S
    while _runs(codes) and time.monotonic() < deadline:
        time.sleep(_LOOK_S)


def _of_main_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            _park()
        return function(*args, **kwargs)

    return call


def _park() -> None:
    threading.Event().wait()


def _runs(codes: set[Any]) -> bool:
    """Whether another thread is inside one of these functions."""
    own = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        stack = []
        at: Any = None if thread == own else frame
        while at is not None:
            stack.append(at.f_code)
            at = at.f_back
        if _park.__code__ not in stack and not codes.isdisjoint(stack):
            return True
    return False
