"""An event loop whose timers are good to microseconds, for requests that are to be sent in time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def run_precisely(work: Coroutine[Any, Any, _T]) -> _T:
    """``asyncio.run`` on a loop that waits with ``select``.

    epoll, and uvloop's timers, count in milliseconds: requests would be sent half a millisecond
    late on average, and that would count as the server's time. A load test's few sockets suit
    ``select`` well.
    """
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        return loop.run_until_complete(work)
    finally:
        loop.run_until_complete(_ended())
        loop.close()


async def _ended() -> None:
    """Everything else that runs in the loop is cancelled, and over."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
