"""``separable_projection`` compiled for GPUs that need not be there: matrix units, no spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ahead_of_time import TARGETS, check, compiled

from fastrec import env
from fastrec.kernels.separable_projection._config import heuristic

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter compiles nothing")

# length, groups, outputs, inputs, taps: the bench's rows.
SHAPES = [(100, 4, 64, 64, 5), (100, 1, 128, 128, 5)]


def forward(target: str, dtype: str, shape: tuple[int, ...]) -> tuple[Any, int]:
    from fastrec.kernels.separable_projection._triton import separable_forward

    length, groups, outputs, inputs, taps = shape
    itemsize = 4 if dtype == "fp32" else 2
    config = heuristic(length, outputs, inputs, itemsize)
    types = {name: f"*{dtype}" for name in separable_forward.arg_names if name.endswith("_ptr")}
    types |= {"lengths_ptr": "*i64", "stride_xb": "i64"}
    constants = {
        "HAS_BIAS": True,
        "HAS_LENGTHS": True,
        "ALIGNED": 16 // itemsize,
        "PRECISION": "ieee",
        "WIDEN": False,
        "ROUND": False,
        "G": groups,
        "O": outputs,
        "I": inputs,
        "W": taps,
        "BLOCK_L": config.block_rows,
        "BLOCK_N": config.block_outputs,
        "BLOCK_K": config.block_inputs,
    }
    numbers = ("L", "before", "tiles_l", "stride_xb", "stride_xl")
    kernel = compiled(
        separable_forward, target, types, constants, numbers, num_warps=config.num_warps
    )
    return kernel, config.block_rows


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_runs_on_matrix_units(
    target: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    kernel, rows = forward(target, "bf16", shape)
    check(kernel, target, tmp_path, matrices=True, rows=rows)
    if target != "gfx942":
        # Neighbouring channels of a shifted tile are read 16 bytes at a time.
        assert "v4.b32" in kernel.asm["ptx"]


@pytest.mark.parametrize("target", TARGETS)
def test_exact_float32_does_not_spill(target: str, tmp_path: Path) -> None:
    kernel, _ = forward(target, "fp32", SHAPES[1])
    check(kernel, target, tmp_path, matrices=False)


@pytest.mark.parametrize("target", TARGETS)
def test_the_convolution_and_its_gradient_do_not_spill(target: str, tmp_path: Path) -> None:
    from fastrec.kernels.separable_projection import _triton

    sizes = {"HAS_LENGTHS": True, "C": 128, "W": 5, "BLOCK_L": 32, "BLOCK_C": 64}
    types = {"x_ptr": "*bf16", "depthwise_ptr": "*bf16", "out_ptr": "*bf16", "lengths_ptr": "*i64"}
    types |= {"dh_ptr": "*fp32", "parts_ptr": "*fp32", "stride_xb": "i64"}
    numbers = ("rows", "L", "before", "tiles_l", "slice_rows", "stride_xb", "stride_xl")
    constants = sizes | {"ALIGNED": 8, "ROUND": False, "FLIP": True}
    kernel = compiled(_triton.depthwise_convolution, target, types, constants, numbers)
    check(kernel, target, tmp_path, matrices=False)
    types["stride_xl"] = "i64"
    kernel = compiled(_triton.depthwise_gradient, target, types, sizes, numbers)
    check(kernel, target, tmp_path, matrices=False)
