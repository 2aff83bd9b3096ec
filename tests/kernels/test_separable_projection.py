"""Gradients, torch.compile, any shape and every bad input of ``separable_projection``; its INT8
form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import kernels
from fastrec.errors import ArgumentError, BackendError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import separable_projection
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.grouped_linear.samples import within
from fastrec.kernels.separable_projection.reference import (
    separable_projection_backward_reference,
)
from fastrec.kernels.separable_projection.samples import compare, sample

ISAS = ["scalar"] if reason_missing() else kernels.available_isas()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    batch, length = draw(st.integers(0, 3)), draw(st.integers(0, 130))
    causal = draw(st.booleans())
    width = draw(st.integers(1, 31))
    valid = st.lists(st.integers(0, length), min_size=batch, max_size=batch)
    return {
        "shape": (
            batch,
            length,
            draw(st.integers(1, 3)),
            draw(st.integers(1, 40)),
            draw(st.integers(1, 40)),
            width if causal else width | 1,
        ),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "lengths": draw(st.none() | valid.map(tuple)),
        "causal": causal,
        "strided": draw(st.booleans()),
    }


def made(case: dict[str, Any], **more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    options = {name: value for name, value in case.items() if name != "shape"}
    return sample(*case["shape"], **options, **more).make()


def gradients(
    args: tuple[torch.Tensor, ...], dy: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, ...]:
    leaves = [arg.detach().requires_grad_() for arg in args]
    return torch.autograd.grad(separable_projection(*leaves, **kwargs), leaves, dy)


@settings(max_examples=40, deadline=None)
@given(case=cases(), bias=st.booleans(), isa=st.sampled_from(ISAS))
def test_any_shape_agrees_with_the_reference(case: dict[str, Any], bias: bool, isa: str) -> None:
    args, kwargs = made(case, bias=bias)
    with kernels.force_isa(isa):
        compare(separable_projection(*args, **kwargs), args, kwargs)


@settings(max_examples=40, deadline=None)
@given(case=cases(), isa=st.sampled_from(ISAS))
def test_any_gradient_agrees_with_the_reference(case: dict[str, Any], isa: str) -> None:
    args, kwargs = made(case)
    x, depthwise, pointwise, _ = args
    groups, outputs, _ = pointwise.shape
    dy = torch.randn(*x.shape[:2], groups * outputs).to(x.dtype)
    plain = separable_projection_backward_reference(dy, *args[:3], **kwargs)
    wide = [t.double() for t in (dy, x, depthwise, pointwise)]
    exact = separable_projection_backward_reference(*wide, **kwargs)
    sizes = separable_projection_backward_reference(*(t.abs() for t in wide), **kwargs)
    with kernels.force_isa(isa):
        # Values beyond the lengths, NaNs included, have no gradient.
        for b, valid in enumerate(kwargs.get("lengths", ())):
            dy[b, valid:] = torch.nan
        actual = gradients(args, dy, **kwargs)
    for got, torchs, true, magnitude in zip(actual, plain, exact, sizes, strict=True):
        assert got.dtype is x.dtype
        within(got, true, torchs.double() - true, magnitude)


def test_results_do_not_depend_on_the_threads() -> None:
    args, kwargs = sample(16, 200, 2, 32, 32, 5, lengths=tuple(range(40, 200, 10))).make()
    dy = torch.randn(16, 200, 64)
    before = kernels.num_threads()
    try:
        kernels.set_num_threads(1)
        alone = gradients(args, dy, **kwargs)
        kernels.set_num_threads(64)
        together = gradients(args, dy, **kwargs)
    finally:
        kernels.set_num_threads(before)
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [None, (3, 0)])
def test_double_precision_gradients(causal: bool, lengths: tuple[int, ...] | None) -> None:
    args, kwargs = sample(2, 4, 2, 2, 2, 3, lengths=lengths, causal=causal).make()
    leaves = [t.nan_to_num(0.5).double().requires_grad_() for t in args]

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return separable_projection(*leaves, **kwargs)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_is_torchs_conv1d_then_linear() -> None:
    (x, depthwise, pointwise, bias), _ = sample(2, 30, 1, 12, 10, 5).make()
    hidden = torch.nn.functional.conv1d(x.mT, depthwise.unsqueeze(1), padding=2, groups=10).mT
    expected = torch.nn.functional.linear(hidden, pointwise[0], bias)
    torch.testing.assert_close(separable_projection(x, depthwise, pointwise, bias), expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_the_gradients_asked_for(wanted: tuple[int, ...]) -> None:
    args, _ = sample(2, 9, 2, 5, 6, 3).make()
    dy = torch.randn(2, 9, 10)
    full = gradients(args, dy)
    leaves = [arg.requires_grad_(i in wanted) for i, arg in enumerate(args)]
    separable_projection(*leaves).backward(dy)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i not in wanted)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, full[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_torch_op_keeps_its_contract(dtype: torch.dtype) -> None:
    args, _ = sample(2, 9, 2, 5, 6, 3).make()
    leaves = [t.to(dtype).requires_grad_() for t in args]
    op = torch.ops.fastrec.separable_projection.default
    lengths = torch.tensor([4, 9])
    torch.library.opcheck(op, leaves, {"lengths": lengths, "causal": True})
    torch.library.opcheck(op, leaves[:3])
    backward = torch.ops.fastrec.separable_projection_backward.default
    dy = torch.randn(2, 9, 10, dtype=dtype)
    fixed = (dy, *(leaf.detach() for leaf in leaves[:3]))
    torch.library.opcheck(backward, (*fixed, lengths, False, [True] * 4))
    torch.library.opcheck(backward, (*fixed, None, True, [False, True, False, False]))


# Inductor imports modules of torch that still use TorchScript.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiles_as_one_graph() -> None:
    def layer(*args: torch.Tensor) -> torch.Tensor:
        return separable_projection(*args, causal=True).tanh()

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        args, _ = sample(2, 9, 2, 5, 6, 3).make()
        leaves = [t.requires_grad_() for t in args]
        y = call(*leaves)
        y.sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_any_stride() -> None:
    (_, depthwise, pointwise, bias), _ = sample(1, 1, 2, 5, 6, 3).make()
    wide = torch.randn(3, 20, 30)
    expected = separable_projection(wide[..., :12].contiguous(), depthwise, pointwise, bias)
    for x in (
        wide[..., :12],
        wide.transpose(0, 1).contiguous().transpose(0, 1)[..., :12],
        wide[..., :12].mT.contiguous().mT,
    ):
        assert torch.equal(separable_projection(x, depthwise, pointwise, bias), expected)


def test_other_floats_run_on_the_reference() -> None:
    args, _ = sample(2, 9, 2, 5, 6, 3).make()
    halves = [t.half() for t in args]
    assert separable_projection(*halves).dtype is torch.float16
    with pytest.raises(BackendError, match="float32 or bfloat16, the input is float16"):
        separable_projection(*halves, backend="cpu")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.zeros(2, 9), ShapeError, r"x: expected shape \[B, L, C\]"),
        ("x", torch.zeros(2, 9, 11), ShapeError, r"x: expected shape \[B, L, 12\]"),
        ("x", torch.zeros(2, 9, 12).int(), DtypeError, "x: expected a floating-point dtype"),
        ("depthwise", torch.zeros(11, 3), ShapeError, r"depthwise: expected shape \[12, W\]"),
        ("depthwise", torch.zeros(12, 4), ShapeError, "1 <= W <= 31, odd, got W = 4"),
        ("depthwise", torch.zeros(12, 33), ShapeError, "1 <= W <= 31, odd, got W = 33"),
        ("depthwise", torch.zeros(12, 0), ShapeError, "1 <= W <= 31, odd, got W = 0"),
        ("depthwise", torch.zeros(12, 3).double(), DtypeError, "depthwise: expected x's dtype"),
        ("depthwise", torch.zeros(12, 3, device="meta"), DeviceError, "depthwise: expected x's"),
        ("pointwise", torch.zeros(5, 12), ShapeError, r"pointwise: expected shape \[G, O, I\]"),
        ("pointwise", torch.zeros(2, 5, 6).double(), DtypeError, "pointwise: expected x's dtype"),
        ("bias", torch.zeros(9), ShapeError, r"bias: expected shape \[10\]"),
        ("lengths", torch.tensor([1]), ShapeError, r"lengths: expected shape \[2\]"),
        ("lengths", torch.tensor([1, 2]).int(), DtypeError, "lengths: expected int64"),
        ("lengths", torch.tensor([1, 10]), ArgumentError, r"values in \[0, 9\], got 10"),
        ("lengths", torch.tensor([-1, 2]), ArgumentError, r"values in \[0, 9\], got -1"),
        ("lengths", torch.zeros(2, device="meta").long(), DeviceError, "lengths: expected x's"),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input_is_named(
    name: str, value: torch.Tensor, error: type[Exception], message: str, backend: str | None
) -> None:
    args, _ = sample(2, 9, 2, 5, 6, 3).make()
    named: dict[str, Any] = dict(zip(("x", "depthwise", "pointwise", "bias"), args, strict=True))
    named[name] = value
    with pytest.raises(error, match=message):
        separable_projection(**named, backend=backend)
