"""The one place that sets torch's thread count around a call, and puts it back.

torch's OpenMP workers and other pools share the cores: after a parallel region, libgomp's workers
keep spinning for about 10 ms, so a torch remainder run on several threads slows down the pool that
comes after it. Engines therefore choose torch's share by measuring it. Reading the count costs
0.1 us, setting it a few microseconds, so it is only set where it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def with_torch_threads(threads: int, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` with torch on ``threads`` threads; the count is put back afterwards."""
    before = torch.get_num_threads()
    if before == threads:
        return function(*args)
    torch.set_num_threads(threads)
    try:
        return function(*args)
    finally:
        torch.set_num_threads(before)
