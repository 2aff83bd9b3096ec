"""Which function lowers which op of torch.export's graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Takes the Lowerer, the node, and its arguments with views for tensors; returns what the node
# becomes: a View, a list of them, or a Python value.
Lowering = Callable[..., Any]
LOWERINGS: dict[Any, Lowering] = {}
# Ops whose results may not fit the integers that torch gives them: plans compute in int64.
OVERFLOWING: set[Any] = set()


def lowers(*targets: Any) -> Callable[[Lowering], Lowering]:
    """Register the lowering of one or more ops."""

    def register(function: Lowering) -> Lowering:
        LOWERINGS.update(dict.fromkeys(targets, function))
        return function

    return register
