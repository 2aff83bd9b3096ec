"""Checks of every float module of ``fastrec.nn``: state, copies, dtypes, tracing, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


def close(got: torch.Tensor, expected: torch.Tensor, terms: int) -> None:
    """Sums of ``terms`` float32 products, taken in another order than torch takes them.

    Each sum is off by at most terms * eps of the sum of its terms' absolute values; values and
    weights here are of order 1, sqrt(terms) of them are what a sum comes to, and a handful of sums
    follow each other: 8 * terms * eps of the largest value covers them.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    got, expected = got.detach(), expected.detach()
    if got.numel():
        bound = 8 * terms * torch.finfo(torch.float32).eps * max(1.0, float(expected.abs().max()))
        assert float((got - expected).abs().max()) <= bound


def same_gradients(
    module: nn.Module,
    expected_of: Callable[..., torch.Tensor],
    x: torch.Tensor,
    parameters: list[nn.Parameter],
    terms: int,
) -> None:
    """Value and gradients, for x and the parameters, of ``module(x)`` and ``expected_of(x)``."""
    x = x.clone().requires_grad_()
    results = []
    for function in (module, expected_of):
        y = function(x)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        results.append((y, torch.autograd.grad((y * weights).sum(), [x, *parameters])))
    close(results[0][0], results[1][0], terms)
    for got, expected in zip(results[0][1], results[1][1], strict=True):
        # A parameter's gradient sums over the rows as well.
        close(got, expected, terms * max(1, x.numel() // x.shape[-1]))


def keeps_the_promises(module: nn.Module, x: torch.Tensor) -> None:
    """State round trip, deep copy, autocast, double, compile and export with free B and L.

    Args:
        module: in evaluation.
        x: [B, L, C], float32.
    """
    with torch.no_grad():
        expected = module(x)
        other = copy.deepcopy(module)
        for parameter in other.parameters():
            parameter.zero_()
        assert not torch.equal(other(x), expected)
        assert not other.load_state_dict(module.state_dict()).missing_keys
        assert torch.equal(other(x), expected)
        assert module.double()(x.double()).dtype is torch.float64
        module.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        assert y.dtype is torch.bfloat16
        # bfloat16 keeps 8 bits; a chain of a few roundings, relative to the largest value
        assert float((y.detach().float() - expected).abs().max()) <= 0.05 * float(
            expected.abs().max()
        )
    y.float().sum().backward()
    module.zero_grad()

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    traced = x.clone().requires_grad_()
    y = compiled(traced)
    assert torch.equal(y, expected)
    y.sum().backward()
    plain = x.clone().requires_grad_()
    module(plain).sum().backward()
    assert traced.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(traced.grad, plain.grad)

    free = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=4096)}
    with torch.no_grad():
        exported = torch.export.export(module, (x,), dynamic_shapes=(free,)).module()
        assert torch.equal(exported(x), expected)
        longer = torch.randn(x.shape[0] + 1, x.shape[1] + 3, x.shape[2])
        assert torch.equal(exported(longer), module(longer))
