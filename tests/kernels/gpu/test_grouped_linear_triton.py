"""``grouped_linear``'s Triton kernels against the reference: interpreted, or on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrec import env
from fastrec.errors import BackendError
from fastrec.kernels import grouped_linear
from fastrec.kernels._compiled import Signature
from fastrec.kernels._gpu import triton_can_run
from fastrec.kernels._registry import Sample
from fastrec.kernels.grouped_linear import SPEC
from fastrec.kernels.grouped_linear.reference import grouped_linear_backward_reference
from fastrec.kernels.grouped_linear.samples import compare, sample, within

DEVICE = "cpu" if env.triton_interpret() else "cuda"
WHY_NOT = triton_can_run(Signature(DEVICE))
runs = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}; TRITON_INTERPRET=1 needs none")
# The interpreter takes a millisecond a program.
SMALL = [case for case in SPEC.samples() if case.macs <= 250_000 and not case.bench]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@runs
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contract_samples(case: Sample) -> None:
    args, kwargs = case.make()
    there = [None if arg is None else arg.to(DEVICE) for arg in args]
    if case.name.endswith("strided"):
        there[0] = torch.nn.functional.pad(there[0], (0, 7), value=torch.nan)[:, :-7]
    compare(grouped_linear(*there, **kwargs, backend="triton").cpu(), args, kwargs)


def gradients(
    rows: int, groups: int, outputs: int, inputs: int, dtype: torch.dtype, shuffle: bool
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    args, _ = sample(rows, groups, outputs, inputs, dtype=dtype, shuffle=shuffle).make()
    generator = torch.Generator().manual_seed(rows)
    dy = torch.randn(rows, groups * outputs, generator=generator).to(dtype)
    leaves = [arg.to(DEVICE).requires_grad_() for arg in args]
    y = grouped_linear(*leaves, shuffle=shuffle, backend="triton")
    grads = torch.autograd.grad(y, leaves, dy.to(DEVICE))
    return tuple(grad.cpu() for grad in grads), (dy, *args)


@runs
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 3, 4), (1, 1, 1, 1), (13, 3, 17, 15), (64, 2, 16, 33), (700, 2, 33, 65)],
    ids=str,
)
def test_gradients(shape: tuple[int, int, int, int], dtype: torch.dtype, shuffle: bool) -> None:
    actual, (dy, x, weight, _) = gradients(*shape, dtype, shuffle)
    plain = grouped_linear_backward_reference(dy, x, weight, shuffle=shuffle)
    wide = (dy.double(), x.double(), weight.double())
    exact = grouped_linear_backward_reference(*wide, shuffle=shuffle)
    sizes = grouped_linear_backward_reference(*(t.abs() for t in wide), shuffle=shuffle)
    for got, torchs, true, magnitude in zip(actual, plain, exact, sizes, strict=True):
        assert got.dtype is dtype
        within(got, true, torchs.double() - true, magnitude)


@runs
def test_gradients_are_deterministic() -> None:
    first, _ = gradients(700, 2, 33, 65, torch.float32, False)
    again, _ = gradients(700, 2, 33, 65, torch.float32, False)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@runs
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_the_gradients_asked_for(wanted: tuple[bool, ...]) -> None:
    args, _ = sample(9, 2, 6, 5).make()
    leaves = [arg.to(DEVICE).requires_grad_(want) for arg, want in zip(args, wanted, strict=True)]
    grouped_linear(*leaves, backend="triton").sum().backward()
    assert tuple(leaf.grad is not None for leaf in leaves) == wanted


def test_doubles_are_for_the_reference() -> None:
    x = torch.zeros(2, 6, dtype=torch.float64)
    with pytest.raises(BackendError, match="float32, bfloat16, float16, the input is float64"):
        grouped_linear(x, x.new_zeros(2, 4, 3), backend="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes CPU tensors")
def test_a_cpu_tensor_is_refused_with_a_reason() -> None:
    with pytest.raises(BackendError, match=r"'triton' can't run: (it runs on a GPU|triton is not)"):
        grouped_linear(torch.zeros(2, 6), torch.zeros(2, 4, 3), backend="triton")
