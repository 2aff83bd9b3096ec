"""Packing, exactness over random shapes, and every bad input of ``sparse_int8_linear``."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.kernels import (
    PackedWeight,
    available_isas,
    force_isa,
    registry,
    sparse_int8_linear,
)
from fastrec.kernels.sparse_int8_linear import _CHECKED
from fastrec.kernels.sparse_int8_linear.packed import MAX_INPUTS
from fastrec.kernels.sparse_int8_linear.samples import compare, random_weight

SCALES: dict[str, Any] = {"x_scale": 0.1, "x_zero_point": 7}


def packed(outputs: int = 40, inputs: int = 24, density: float = 1.0) -> PackedWeight:
    return random_weight(outputs, inputs, density, torch.Generator().manual_seed(0))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 40),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 150),
    density=st.floats(0, 1),
    zero_point=st.integers(0, 255),
    activation=st.sampled_from([None, "relu", "gelu"]),
    out=st.sampled_from([None, "uint8", "bfloat16"]),
    x_dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
    isa=st.sampled_from(available_isas()),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_the_reference(
    rows: int,
    outputs: int,
    inputs: int,
    density: float,
    zero_point: int,
    activation: str | None,
    out: str | None,
    x_dtype: torch.dtype,
    isa: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(outputs, inputs, density, generator)
    x = torch.randint(0, 256, (rows, inputs), generator=generator, dtype=torch.uint8)
    if x_dtype.is_floating_point:
        x = ((x.float() - zero_point) * 0.04).to(x_dtype)
    kwargs: dict[str, Any] = {"x_scale": 0.03, "x_zero_point": zero_point, "activation": activation}
    kwargs["out"] = out
    if out == "uint8":
        kwargs |= {"out_scale": 0.05, "out_zero_point": 100}
    with force_isa(isa):
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
            "x: expected uint8, float32 or bfloat16",
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


def test_prepared_handles_follow_the_tensors() -> None:
    weight, x = packed(), torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    bias = torch.randn(40)

    def agrees(**change: Any) -> None:
        kwargs = {**SCALES, "bias": bias, **change}
        for _ in range(2):
            compare(sparse_int8_linear(x, weight, **kwargs), (x, weight), kwargs)

    agrees()
    agrees(out="bfloat16")
    agrees(bias=torch.randn(80)[::2])
    bias.add_(1)
    agrees()
    weight.scale.mul_(2)
    agrees()
    bias.set_(torch.randn(40))
    agrees()
    for zero_point in range(20):  # more epilogues than are kept
        agrees(x_zero_point=zero_point)
    bias[3] = torch.nan
    with pytest.raises(ArgumentError, match="bias"):
        sparse_int8_linear(x, weight, bias=bias, **SCALES)
    again = copy.deepcopy(weight)
    assert torch.equal(
        sparse_int8_linear(x, again, **SCALES), sparse_int8_linear(x, weight, **SCALES)
    )
    pickle.loads(pickle.dumps(weight))


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        weight, x = packed(), torch.randint(0, 256, (5, 24), dtype=torch.uint8)
        kwargs = {**SCALES, "bias": torch.zeros(40)}
        for _ in range(2):
            compare(sparse_int8_linear(x, weight, **kwargs), (x, weight), kwargs)
            weight.scale.mul_(2)


def test_the_public_function_compiles_whole() -> None:
    weight, x = packed(density=0.5), torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    kwargs: dict[str, Any] = {**SCALES, "bias": torch.randn(40), "out": "bfloat16"}
    compiled = torch.compile(
        lambda x: sparse_int8_linear(x, weight, **kwargs), fullgraph=True, backend="aot_eager"
    )
    compare(compiled(x), (x, weight), kwargs)


def test_the_torch_op_checks_a_weight_once_and_sees_changes() -> None:
    weight, x = packed(), torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    scalars = (torch.tensor(0.1, dtype=torch.float64), torch.tensor(7, dtype=torch.int32))
    parts = [weight.values, weight.group_index, weight.panel_start, weight.scale]

    def agrees() -> None:
        result = torch.ops.fastrec.sparse_int8_linear(x, *parts, None, *scalars, None, None, None)
        now = PackedWeight.from_parts(*parts, 40, 24)
        compare(result, (x, now), SCALES)

    agrees()
    agrees()
    weight.values[0, 0] += 1
    agrees()
    parts[3] = weight.scale * 2
    agrees()
    before = len(_CHECKED)
    del weight, parts[0]
    gc.collect()
    assert len(_CHECKED) == before - 1


def test_bfloat16_input_quantises_as_its_float32_value() -> None:
    x = (torch.randn(5, 24) * 3).bfloat16()
    kwargs = {**SCALES, "out": "uint8", "out_scale": 0.5, "out_zero_point": 100}
    assert torch.equal(
        sparse_int8_linear(x, packed(), **kwargs), sparse_int8_linear(x.float(), packed(), **kwargs)
    )


def test_extreme_activations_do_not_saturate() -> None:
    # Pairs of 255 * 127 or 255 * -128 exceed 16 bits: what vpmaddubsw would clip.
    for value in (127, -128):
        weight = PackedWeight.pack(torch.full((33, 70), value, dtype=torch.int8), torch.ones(33))
        x = torch.full((13, 70), 255, dtype=torch.uint8)
        for isa in available_isas():
            with force_isa(isa):
                result = sparse_int8_linear(x, weight, x_scale=1.0, x_zero_point=0)
            assert bool((result == 255 * value * 70).all())


def test_density_counts_kept_groups() -> None:
    for spec_density in (0.0, 0.25, 1.0):
        assert packed(64, 64, spec_density).density == spec_density
    assert registry()["sparse_int8_linear"].samples()
