"""``separable_projection``'s Triton kernels against the reference: interpreted, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrec import env
from fastrec.errors import ArgumentError
from fastrec.kernels import separable_projection
from fastrec.kernels._compiled import Signature
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels._registry import Sample
from fastrec.kernels.grouped_linear.samples import within
from fastrec.kernels.separable_projection import SPEC
from fastrec.kernels.separable_projection.reference import separable_projection_backward_reference
from fastrec.kernels.separable_projection.samples import compare, sample

DEVICE = "cpu" if env.triton_interpret() else "cuda"
WHY_NOT = triton_can_run(Signature(DEVICE))
runs = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}; TRITON_INTERPRET=1 needs none")
SMALL = [case for case in SPEC.samples() if case.macs <= 60_000 and not case.bench]


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@runs
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contract_samples(case: Sample) -> None:
    args, kwargs = case.make()
    on_device = {name: there(value) for name, value in kwargs.items()}
    compare(
        separable_projection(*map(there, args), **on_device, backend="triton").cpu(), args, kwargs
    )


@runs
@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        (torch.float32, (2, 37, 2, 9, 10, 5), {"lengths": (37, 20)}),
        (torch.float32, (1, 40, 1, 16, 33, 4), {"causal": True, "strided": True}),
        (torch.float32, (0, 5, 1, 4, 4, 3), {}),
        (torch.bfloat16, (2, 30, 2, 17, 8, 3), {"lengths": (0, 30)}),
        (torch.float16, (2, 30, 1, 8, 17, 7), {"causal": True}),
    ],
    ids=str,
)
def test_gradients(dtype: torch.dtype, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    args, kwargs = sample(*shape, dtype=dtype, **options).make()
    x, depthwise, pointwise, _ = args
    dy = torch.randn(
        *x.shape[:2], shape[2] * shape[3], generator=torch.Generator().manual_seed(1)
    ).to(dtype)
    on_device = {name: there(value) for name, value in kwargs.items()}
    leaves = [there(arg).requires_grad_() for arg in args]
    y = separable_projection(*leaves, **on_device, backend="triton")
    got = torch.autograd.grad(y, leaves, there(dy))
    inputs = (dy, x, depthwise, pointwise)
    plain = separable_projection_backward_reference(*inputs, **kwargs)
    wide = [t.double() for t in inputs]
    exact = separable_projection_backward_reference(*wide, **kwargs)
    magnitude = separable_projection_backward_reference(*(t.abs() for t in wide), **kwargs)
    # The hidden rows are rounded as they would be between two layers, each value by half a unit.
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
    # A 16-bit result is rounded itself; ``within`` knows of bfloat16's.
    half = 2.0**-11 if dtype is torch.float16 else 0.0
    for one, torchs, true, size in zip(got, plain, exact, magnitude, strict=True):
        assert one.dtype is dtype
        within(one.cpu(), true, torchs.double() - true, size, unit * size + half * true.abs())


@runs
def test_gradients_are_deterministic_and_made_in_slices() -> None:
    args, kwargs = sample(1, 530, 1, 4, 5, 2, causal=True).make()

    def gradients() -> tuple[torch.Tensor, ...]:
        leaves = [there(arg).requires_grad_() for arg in args]
        y = separable_projection(*leaves, **kwargs, backend="triton")
        return torch.autograd.grad(y.square().sum(), leaves)

    first, again = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    leaves = [arg.double().requires_grad_() for arg in args]
    y = separable_projection(*leaves, **kwargs)
    for a, b in zip(first, torch.autograd.grad(y.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@runs
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is not waited for")
def test_lengths_out_of_range() -> None:
    (x, *rest), _ = sample(2, 5, 1, 4, 4, 3).make()
    with pytest.raises(ArgumentError, match=r"lengths: .*\[0, 5\], got 6"):
        separable_projection(x, *rest, lengths=torch.tensor([1, 6]), backend="triton")
