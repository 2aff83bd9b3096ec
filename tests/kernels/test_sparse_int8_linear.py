"""Packing, exactness over random shapes, and every bad input of ``sparse_int8_linear``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.kernels import PackedWeight, registry, sparse_int8_linear
from fastrec.kernels.sparse_int8_linear.packed import MAX_INPUTS
from fastrec.kernels.sparse_int8_linear.samples import compare, random_weight

SCALES: dict[str, Any] = {"x_scale": 0.1, "x_zero_point": 7}


def packed(outputs: int = 40, inputs: int = 24, density: float = 1.0) -> PackedWeight:
    return random_weight(outputs, inputs, density, torch.Generator().manual_seed(0))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 150),
    density=st.floats(0, 1),
    zero_point=st.integers(0, 255),
    activation=st.sampled_from([None, "relu", "gelu"]),
    quantised=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_the_reference(
    rows: int,
    outputs: int,
    inputs: int,
    density: float,
    zero_point: int,
    activation: str | None,
    quantised: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(outputs, inputs, density, generator)
    x = torch.randint(0, 256, (rows, inputs), generator=generator, dtype=torch.uint8)
    kwargs: dict[str, Any] = {"x_scale": 0.03, "x_zero_point": zero_point, "activation": activation}
    if quantised:
        kwargs |= {"out": "uint8", "out_scale": 0.05, "out_zero_point": 100}
    compare(sparse_int8_linear(x, weight, **kwargs), (x, weight), kwargs)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 80),
    inputs=st.integers(1, 80),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_packing_loses_nothing_and_keeps_no_empty_group(
    outputs: int, inputs: int, zeros: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    weight[torch.rand(outputs, inputs, generator=generator) < zeros] = 0
    result = PackedWeight.pack(weight, torch.ones(outputs))
    assert torch.equal(result.unpack(), weight)
    assert bool((result.values != 0).any(1).all())
    assert torch.equal(result.sum, weight.sum(1, dtype=torch.int32))
    again = PackedWeight.from_parts(
        result.values, result.group_index, result.panel_start, result.scale, outputs, inputs
    )
    assert torch.equal(again.unpack(), weight)
    assert torch.equal(again.sum, result.sum)


def test_the_largest_accumulator_is_exact() -> None:
    weight = PackedWeight.pack(torch.full((1, MAX_INPUTS), -128, dtype=torch.int8), torch.ones(1))
    x = torch.full((1, MAX_INPUTS), 255, dtype=torch.uint8)
    exact = -128 * 255 * MAX_INPUTS
    assert exact > -(2**31)
    result = sparse_int8_linear(x, weight, x_scale=1.0, x_zero_point=0)
    assert result.item() == torch.tensor(exact).float().item()


def test_values_far_outside_the_range_clip() -> None:
    weight = packed()
    huge = torch.tensor([3e38, -3e38]).repeat(12).reshape(1, 24)
    result = sparse_int8_linear(
        huge, weight, **SCALES, out="uint8", out_scale=1e-30, out_zero_point=9
    )
    assert set(result.unique().tolist()) <= {0, 255, 9}


def test_non_contiguous_input() -> None:
    x = torch.randint(0, 256, (24, 6), dtype=torch.uint8).T
    assert not x.is_contiguous()
    compare(sparse_int8_linear(x, packed(), **SCALES), (x, packed()), SCALES)


def test_leading_dimensions_are_kept() -> None:
    x = torch.zeros(2, 3, 24, dtype=torch.uint8)
    assert sparse_int8_linear(x, packed(), **SCALES).shape == (2, 3, 40)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"x_u8": torch.zeros(2, 23, dtype=torch.uint8)},
            ShapeError,
            r"x: .*\[\.\.\., 24\], got \[2, 23\]",
        ),
        ({"x_u8": torch.zeros((), dtype=torch.uint8)}, ShapeError, "x: "),
        (
            {"x_u8": torch.zeros(2, 24, dtype=torch.int32)},
            DtypeError,
            "x: expected uint8 or float32",
        ),
        ({"x_u8": torch.full((2, 24), torch.nan)}, ArgumentError, "x: expected numbers, got a NaN"),
        ({"x_scale": float("nan")}, ArgumentError, "x_scale"),
        ({"x_scale": 0.0}, ArgumentError, "x_scale"),
        ({"x_scale": -1.0}, ArgumentError, "x_scale"),
        ({"x_zero_point": 256}, ArgumentError, "x_zero_point"),
        ({"x_zero_point": -1}, ArgumentError, "x_zero_point"),
        ({"bias": torch.zeros(41)}, ShapeError, r"bias: expected shape \[40\], got \[41\]"),
        ({"bias": torch.zeros(40, dtype=torch.float64)}, DtypeError, "bias"),
        ({"bias": torch.full((40,), torch.inf)}, ArgumentError, "bias: expected finite"),
        ({"activation": "tanh"}, ArgumentError, "activation: expected None, 'relu' or 'gelu'"),
        ({"out": "int4"}, ArgumentError, "out: "),
        ({"out": "uint8"}, ArgumentError, "out_scale: "),
        ({"out_scale": 1.0, "out_zero_point": 0}, ArgumentError, "out_scale: "),
        ({"out": "uint8", "out_scale": 1.0}, ArgumentError, "out_zero_point: "),
        (
            {"out": "uint8", "out_scale": float("inf"), "out_zero_point": 0},
            ArgumentError,
            "out_scale",
        ),
    ],
)
def test_bad_input_names_the_argument(
    backend: str, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    kwargs = {"x_u8": torch.zeros(2, 24, dtype=torch.uint8), **SCALES, **change}
    with pytest.raises(error, match=text):
        sparse_int8_linear(packed=packed(), backend=backend, **kwargs)


@pytest.mark.parametrize(
    ("weight", "scale", "error", "text"),
    [
        (torch.zeros(2, 2), torch.ones(2), DtypeError, "weight_s8: expected int8"),
        (torch.zeros(2, dtype=torch.int8), torch.ones(2), ShapeError, "weight_s8"),
        (torch.zeros(0, 4, dtype=torch.int8), torch.ones(0), ShapeError, "weight_s8"),
        (
            torch.zeros(1, MAX_INPUTS + 1, dtype=torch.int8),
            torch.ones(1),
            ArgumentError,
            "K = 65794",
        ),
        (torch.zeros(2, 2, dtype=torch.int8), torch.ones(3), ShapeError, "scale"),
        (
            torch.zeros(2, 2, dtype=torch.int8),
            torch.tensor([1.0, torch.nan]),
            ArgumentError,
            "scale",
        ),
        (torch.zeros(2, 2, dtype=torch.int8), torch.tensor([1.0, 0.0]), ArgumentError, "scale"),
    ],
)
def test_bad_weights_are_refused(
    weight: torch.Tensor, scale: torch.Tensor, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        PackedWeight.pack(weight, scale)


@pytest.mark.parametrize(
    ("part", "position", "value", "text"),
    [
        ("group_index", 0, -1, "group_index"),
        ("group_index", -1, 6, "group_index"),
        ("group_index", 1, 0, "a repeated group"),
        ("panel_start", 0, 1, "panel_start"),
        ("panel_start", 1, 99, "panel_start"),
        ("panel_start", -1, 3, "panel_start"),
    ],
)
def test_broken_parts_are_refused(part: str, position: int, value: int, text: str) -> None:
    weight = packed()
    parts = {
        name: getattr(weight, name).clone()
        for name in ("values", "group_index", "panel_start", "scale")
    }
    parts[part][position] = value
    with pytest.raises(ArgumentError, match=text):
        PackedWeight.from_parts(**parts, outputs=weight.outputs, inputs=weight.inputs)


def test_the_torch_op_passes_opcheck_and_compiles() -> None:
    weight = packed(density=0.5)
    x = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    scalars = (torch.tensor(0.1), torch.tensor(7, dtype=torch.int32))
    args = (x, weight.values, weight.group_index, weight.panel_start, weight.scale, None, *scalars)
    op = torch.ops.fastrec.sparse_int8_linear.default
    torch.library.opcheck(op, (*args, "relu", None, None))
    kwargs = {"x_scale": 0.1, "x_zero_point": 7, "activation": "relu"}
    compare(op(*args, "relu", None, None), (x, weight), {**kwargs, "x_scale": scalars[0].item()})


def test_density_counts_kept_groups() -> None:
    for spec_density in (0.0, 0.25, 1.0):
        assert packed(64, 64, spec_density).density == spec_density
    assert registry()["sparse_int8_linear"].samples()
