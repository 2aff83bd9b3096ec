"""Checks and casts of the projection modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastrec.errors import ArgumentError, DtypeError


def check_size(name: str, value: Any) -> None:
    """ArgumentError unless ``value`` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArgumentError(name, "a positive integer", value)


def check_groups(groups: Any, in_features: int, out_features: int) -> None:
    """ArgumentError unless ``groups`` divides both."""
    check_size("groups", groups)
    if in_features % groups or out_features % groups:
        raise ArgumentError(
            "groups",
            f"a divisor of in_features = {in_features} and out_features = {out_features}",
            groups,
        )


def check_linear(linear: Any) -> nn.Linear:
    """``linear``, or an error where it is no ``nn.Linear`` with finite weights.

    Raises:
        DtypeError: another type.
        ArgumentError: a weight or bias is a NaN or an infinity.
    """
    if not isinstance(linear, nn.Linear):
        raise DtypeError("linear", "a torch.nn.Linear", type(linear).__name__)
    for tensor in (linear.weight, linear.bias):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ArgumentError("linear", "finite weights", "a NaN or an infinity")
    return linear


def like(tensor: torch.Tensor) -> dict[str, Any]:
    """The constructor's ``device`` and ``dtype`` that make parameters like ``tensor``."""
    return {"device": tensor.device, "dtype": tensor.dtype}


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in autocast's dtype where it is on for the first one's device.

    Ops of ours are unknown to autocast; ``nn.Linear`` would be cast, so its replacements are too.
    float64 stays, as it does in torch.
    """
    first = tensors[0]
    assert first is not None
    kind = first.device.type
    if not torch.is_autocast_enabled(kind) or first.dtype is torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class _NoFusedPath:
    """Stands where torch's attention has its weight.

    ``nn.TransformerEncoder`` and its layers hand weights to one fused call, unless a weight brings
    its own ``__torch_function__``: then they call their modules.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ArgumentError(
            "model",
            "attention that is called as a module (leave this one out by filter_fn)",
            f"{getattr(function, '__name__', function)} on its weight",
        )


NO_FUSED_PATH = _NoFusedPath()
