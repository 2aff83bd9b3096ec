"""Gradients, torch.compile, any shape and every bad input of ``grouped_linear``; its INT8 form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec import kernels
from fastrec.errors import BackendError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import PackedWeight, grouped_linear, sparse_int8_linear
from fastrec.kernels._compiled import reason_missing
from fastrec.kernels.grouped_linear.reference import grouped_linear_backward_reference
from fastrec.kernels.grouped_linear.samples import compare, sample, within

ISAS = ["scalar"] if reason_missing() else kernels.available_isas()
NAMES = ("x", "weight", "bias")


def tensors(
    rows: int, groups: int, outputs: int, inputs: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    args, _ = sample(rows, groups, outputs, inputs, dtype=dtype).make()
    return args


def gradients(
    args: tuple[torch.Tensor, ...], dy: torch.Tensor, shuffle: bool
) -> tuple[torch.Tensor, ...]:
    leaves = [arg.detach().requires_grad_() for arg in args]
    y = grouped_linear(*leaves, shuffle=shuffle)
    return torch.autograd.grad(y, leaves, dy)


def check_gradients(
    actual: tuple[torch.Tensor, ...],
    args: tuple[torch.Tensor, ...],
    dy: torch.Tensor,
    shuffle: bool,
) -> None:
    x, weight, _ = args
    plain = grouped_linear_backward_reference(dy, x, weight, shuffle=shuffle)
    wide = (dy.double(), x.double(), weight.double())
    exact = grouped_linear_backward_reference(*wide, shuffle=shuffle)
    sizes = grouped_linear_backward_reference(*(t.abs() for t in wide), shuffle=shuffle)
    for got, torchs, true, magnitude in zip(actual, plain, exact, sizes, strict=True):
        assert got.dtype is x.dtype
        within(got, true, torchs.double() - true, magnitude)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 60),
    groups=st.integers(1, 5),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shuffle=st.booleans(),
    bias=st.booleans(),
    strided=st.booleans(),
    isa=st.sampled_from(ISAS),
)
def test_any_shape_agrees_with_the_reference(
    rows: int,
    groups: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    shuffle: bool,
    bias: bool,
    strided: bool,
    isa: str,
) -> None:
    args, kwargs = sample(
        rows, groups, outputs, inputs, dtype=dtype, shuffle=shuffle, bias=bias, strided=strided
    ).make()
    with kernels.force_isa(isa):
        compare(grouped_linear(*args, **kwargs), args, kwargs)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 300),
    groups=st.integers(1, 4),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shuffle=st.booleans(),
    isa=st.sampled_from(ISAS),
)
def test_any_gradient_agrees_with_the_reference(
    rows: int,
    groups: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    shuffle: bool,
    isa: str,
) -> None:
    args = tensors(rows, groups, outputs, inputs, dtype)
    dy = torch.randn(rows, groups * outputs).to(dtype)
    with kernels.force_isa(isa):
        check_gradients(gradients(args, dy, shuffle), args, dy, shuffle)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_summed_in_slices(isa: str, dtype: torch.dtype) -> None:
    args = tensors(3000, 2, 13, 70, dtype)
    dy = torch.randn(3000, 26).to(dtype)
    with kernels.force_isa(isa):
        check_gradients(gradients(args, dy, False), args, dy, False)


def test_gradients_do_not_depend_on_the_threads() -> None:
    args = tensors(6400, 2, 64, 64)
    dy = torch.randn(6400, 128)
    before = kernels.num_threads()
    try:
        kernels.set_num_threads(1)
        alone = gradients(args, dy, False)
        kernels.set_num_threads(64)
        together = gradients(args, dy, False)
    finally:
        kernels.set_num_threads(before)
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("shuffle", [False, True])
def test_double_precision_gradients(shuffle: bool) -> None:
    args = [t.double().requires_grad_() for t in tensors(4, 2, 3, 5)]

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return grouped_linear(*leaves, shuffle=shuffle)

    assert torch.autograd.gradcheck(call, args)
    assert torch.autograd.gradgradcheck(call, args)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_only_the_gradients_asked_for(wanted: tuple[int, ...]) -> None:
    args = tensors(9, 2, 6, 5)
    dy = torch.randn(9, 12)
    full = gradients(args, dy, False)
    leaves = [arg.requires_grad_(i in wanted) for i, arg in enumerate(args)]
    grouped_linear(*leaves).backward(dy)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i not in wanted)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, full[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_torch_op_keeps_its_contract(dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype).requires_grad_() for t in tensors(7, 2, 6, 5))
    op = torch.ops.fastrec.grouped_linear.default
    torch.library.opcheck(op, (x, weight, bias), {"shuffle": True})
    torch.library.opcheck(op, (x.detach(), weight))
    backward = torch.ops.fastrec.grouped_linear_backward.default
    dy = torch.randn(7, 12, dtype=dtype)
    fixed = (dy, x.detach(), weight.detach(), False)
    torch.library.opcheck(backward, (*fixed, True, True, True))
    torch.library.opcheck(backward, (*fixed, False, True, False))


# Inductor imports modules of torch that still use TorchScript.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_compiles_as_one_graph() -> None:
    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return grouped_linear(x.relu(), weight, bias, shuffle=True).tanh()

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [t.requires_grad_() for t in tensors(20, 2, 6, 5)]
        y = call(*leaves)
        y.sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_any_leading_shape_and_stride() -> None:
    _, weight, bias = tensors(1, 2, 6, 5)
    wide = torch.randn(3, 4, 30)
    expected = grouped_linear(wide[..., :10].contiguous(), weight, bias)
    for x in (
        wide[..., :10],
        wide.transpose(0, 1).contiguous().transpose(0, 1)[..., :10],
        wide[..., :10].mT.contiguous().mT,
    ):
        assert torch.equal(grouped_linear(x, weight, bias), expected)
    assert grouped_linear(wide[0, 0, :10], weight, bias).shape == (12,)
    assert grouped_linear(wide[:0, :, :10], weight, bias).shape == (0, 4, 12)
    by_columns = weight.mT.contiguous().mT
    assert torch.equal(grouped_linear(wide[..., :10], by_columns, bias), expected)


def test_updated_weights_count_at_once() -> None:
    x, weight, _ = tensors(20, 2, 6, 5)
    before = grouped_linear(x, weight)
    weight.mul_(2)
    assert torch.equal(grouped_linear(x, weight), 2 * before)


def test_shuffle_interleaves_the_groups() -> None:
    x, weight, bias = tensors(9, 3, 4, 5)
    plain = grouped_linear(x, weight, bias)
    shuffled = grouped_linear(x, weight, bias, shuffle=True)
    for g in range(3):
        assert torch.equal(shuffled[:, g::3], plain[:, 4 * g : 4 * g + 4])


def test_other_floats_run_on_the_reference() -> None:
    args = tuple(t.half() for t in tensors(5, 2, 6, 5))
    assert grouped_linear(*args).dtype is torch.float16
    with pytest.raises(BackendError, match="float32 or bfloat16, the input is float16"):
        grouped_linear(*args, backend="cpu")


@pytest.mark.parametrize(
    ("position", "value", "error", "message"),
    [
        (0, torch.zeros(3, 11), ShapeError, r"x: expected shape \[\.\.\., 10\], got \[3, 11\]"),
        (0, torch.tensor(1.0), ShapeError, r"x: expected shape \[\.\.\., 10\], got \[\]"),
        (0, torch.zeros(3, 10).int(), DtypeError, "x: expected a floating-point dtype"),
        (1, torch.zeros(12, 5), ShapeError, r"weight: expected shape \[G, O, I\]"),
        (1, torch.zeros(2, 0, 5), ShapeError, r"weight: expected shape \[G, O, I\], all > 0"),
        (1, torch.zeros(2, 6, 5).double(), DtypeError, "weight: expected x's dtype"),
        (1, torch.zeros(2, 6, 5, device="meta"), DeviceError, "weight: expected x's device cpu"),
        (2, torch.zeros(11), ShapeError, r"bias: expected shape \[12\], got \[11\]"),
        (2, torch.zeros(2, 6), ShapeError, r"bias: expected shape \[12\], got \[2, 6\]"),
        (2, torch.zeros(12).bfloat16(), DtypeError, "bias: expected x's dtype"),
        (2, torch.zeros(12, device="meta"), DeviceError, "bias: expected x's device cpu"),
    ],
)
def test_bad_input_is_named(
    position: int, value: torch.Tensor, error: type[Exception], message: str
) -> None:
    args: list[Any] = list(tensors(3, 2, 6, 5))
    args[position] = value
    with pytest.raises(error, match=message):
        grouped_linear(*args)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 5),
    outputs=st.integers(1, 70),
    inputs=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_grouped_int8_is_exact(
    rows: int, groups: int, outputs: int, inputs: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, outputs, inputs)
    weight = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    x = torch.randint(0, 256, (rows, groups * inputs), generator=generator, dtype=torch.uint8)
    packed = PackedWeight.pack(torch.block_diag(*weight), torch.ones(groups * outputs))
    got = sparse_int8_linear(x, packed, x_scale=1.0, x_zero_point=9)
    by_group = x.view(rows, groups, inputs).double() - 9
    expected = torch.einsum("mgi,goi->mgo", by_group, weight.double())
    # The accumulator is exact; its conversion to float32 rounds once.
    assert torch.equal(got, expected.reshape(rows, -1).float())


def test_grouped_int8_stores_only_the_blocks() -> None:
    weight = torch.full((4, 64, 64), 3, dtype=torch.int8)
    packed = PackedWeight.pack(torch.block_diag(*weight), torch.ones(256))
    assert packed.density == 0.25
    # 24 outputs a group: a panel of 32 straddles two groups and keeps the inputs of both.
    straddling = PackedWeight.pack(torch.block_diag(*weight[:, :24]), torch.ones(96))
    assert [int(n) for n in straddling.panel_start.diff()] == [32, 32, 32]
