"""Ops as torch sees them: their registration, and which calls go past its dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_LIBRARY = torch.library.Library("fastrec", "FRAGMENT")

FLOAT_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}


def define_op(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    devices: Sequence[str] = ("CompositeExplicitAutograd",),
) -> None:
    """Registers ``torch.ops.fastrec.<id>``.

    Torch leaves out trailing arguments that have their default, so ``run`` and ``fake`` have
    defaults too.

    Args:
        schema: the op's id, arguments and results, as ``torch.library`` writes them.
        run: computes the results; outside autograd.
        fake: empty results of the right shape and dtype, for tracing.
        backward: takes the context and each result's gradient, gives each argument's; None for an
            op without gradients.
        save: takes the context, the arguments and the results, and keeps what ``backward`` needs.
        devices: the dispatch keys of ``run``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in devices:
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fastrec::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"fastrec::{name}", backward, setup_context=save, lib=_LIBRARY
        )


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether only autograd may need to see a call: no tracing, no modes, no tensor subclasses."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for tensor in tensors:
        kind = type(tensor)
        if not (tensor is None or kind is torch.Tensor or kind is torch.nn.Parameter):
            return False
    return not torch._C._functorch.maybe_current_level()


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must record a call."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
