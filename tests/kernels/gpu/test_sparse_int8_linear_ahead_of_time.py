"""``sparse_int8_linear`` in Triton for GPUs that need not be there: on matrix units, unspilled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from ahead_of_time import TARGETS, check, compiled

from fastrec import env
from fastrec.kernels.sparse_int8_linear._config import triton_heuristic

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter compiles nothing")

# rows, panels, steps of a panel: a tower layer for 64 users, and one row.
SHAPES = [(3200, 32, 32), (1, 32, 128)]
NUMBERS = dict.fromkeys(("x_inverse_scale", "y_inverse_scale"), "fp32")


def build(target: str, shape: tuple[int, int, int], x: str = "u8", y: str = "u8") -> Any:
    """The kernel as the op launches it."""
    from fastrec.kernels.sparse_int8_linear._triton import multiply

    config = triton_heuristic(*shape)
    pointers = {"x_ptr": f"*{x}", "values_ptr": "*i8", "index_ptr": "*i32", "bias_ptr": "*fp32"}
    pointers |= {"step_start_ptr": "*i32", "start_ptr": "*i32", "scale_ptr": "*fp32"}
    pointers |= {"y_ptr": "*i32" if config.splits > 1 else f"*{y}"} | NUMBERS
    constants = {
        "ACTIVATION": 1,
        "QUANTISE": x != "u8",
        "SPLIT": config.splits > 1,
        "ROUND": False,
        "BLOCK_M": config.rows,
        "STEPS": config.steps,
    }
    unaligned = ("M", "chunks", "panels", "splits", "x_zero_point", "y_zero_point", *NUMBERS)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    options |= {"enable_fp_fusion": False}
    return compiled(multiply, target, pointers, constants, unaligned, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_integers_run_on_matrix_units(
    target: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    kernel = build(target, shape)
    # sm_100 has no 8-bit integers but for mma.sync; with panels of 32, wgmma is not for all tiles.
    check(kernel, target, tmp_path, matrices=TARGETS[target][0] == "hip", rows=16)
    if TARGETS[target][0] == "cuda":
        text = kernel.asm["ptx"]
        assert re.search(r"(wgmma\.mma_async|mma)\.sync\.\S*s32\.s8\.s8", text), target
        assert "fma.rn.f32" not in text, "two roundings became one"


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_float_inputs_and_outputs_compile_unspilled(target: str, tmp_path: Path) -> None:
    check(build(target, SHAPES[0], x="bf16", y="bf16"), target, tmp_path, matrices=False)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_sum_of_splits_compiles(target: str, tmp_path: Path) -> None:
    from fastrec.kernels.sparse_int8_linear._triton import FINISH_ROWS, finish

    pointers = {"parts_ptr": "*i32", "start_ptr": "*i32", "scale_ptr": "*fp32"}
    pointers |= {"bias_ptr": "*fp32", "y_ptr": "*u8", "y_inverse_scale": "fp32"}
    constants = {"ACTIVATION": 2, "ROUND": False, "BLOCK_M": FINISH_ROWS}
    unaligned = ("M", "panels", "splits", "y_zero_point", "y_inverse_scale")
    kernel = compiled(finish, target, pointers, constants, unaligned, num_warps=4)
    check(kernel, target, tmp_path, matrices=False)


def test_the_number_of_rows_compiles_few_kernels() -> None:
    configs = {triton_heuristic(rows, 32, 32) for rows in range(1, 20_000)}
    assert len({(c.rows, c.steps, c.splits > 1) for c in configs}) <= 8
