"""``grouped_linear`` for GPUs that need not be there: it compiles, on matrix units, unspilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ahead_of_time import TARGETS, check, compiled

from fastrec import env
from fastrec.kernels.grouped_linear._config import heuristic

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter compiles nothing")

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
# rows, groups, outputs, inputs of the bench's goal rows and of one that fills the largest tile.
SHAPES = [(6400, 4, 64, 64), (100, 4, 64, 64), (65536, 2, 256, 256)]


def build(
    target: str, way: str, dtype: str, shape: tuple[int, int, int, int], precision: str
) -> tuple[Any, int]:
    """The kernel as the op launches it for the forward, dx ("x") or dw ("weight"), and its rows."""
    from fastrec.kernels.grouped_linear._triton import grouped_gemm

    rows, groups, outputs, inputs = shape
    units = {"forward": ("ak", "bk"), "x": ("ak", "bn"), "weight": ("ar", "bn")}[way]
    sizes = {
        "forward": (rows, outputs, inputs),
        "x": (rows, inputs, outputs),
        "weight": (outputs, inputs, rows),
    }[way]
    weight = way == "weight"
    config = heuristic(*sizes, groups, DTYPES[dtype], sliced=weight)
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "bias_ptr", "c_ptr", "sums_ptr"), f"*{dtype}")
    if config.slices > 1:
        pointers |= {"c_ptr": "*fp32", "sums_ptr": "*fp32"}
    constants: dict[str, Any] = {f"stride_{name}": 1 for name in (*units, "cn")}
    constants |= {
        "HAS_BIAS": way == "forward",
        "SUM_ROWS": weight,
        "PRECISION": precision,
        "WIDEN": False,
        "ROUND": False,
        "ALIGNED_R": weight,
        "ALIGNED_K": not weight,
        "BLOCK_R": config.block_rows,
        "BLOCK_N": config.block_cols,
        "BLOCK_K": config.block_terms,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = compiled(grouped_gemm, target, pointers, constants, ("R", "K", "G"), **options)
    return kernel, config.block_rows


# Few rows change the tiles of the forward and of dx alike, and not those of dw.
CASES = [("forward", shape) for shape in SHAPES]
CASES += [(way, shape) for way in ("x", "weight") for shape in (SHAPES[0], SHAPES[2])]


@pytest.mark.parametrize(("way", "shape"), CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_runs_on_matrix_units(
    target: str, way: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    for dtype in ("bf16", "fp16") if shape == SHAPES[0] else ("bf16",):
        kernel, rows = build(target, way, dtype, shape, "ieee")
        check(kernel, target, tmp_path, matrices=True, rows=rows)


@pytest.mark.parametrize("way", ["forward", "x", "weight"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_tf32_runs_on_matrix_units(target: str, way: str, tmp_path: Path) -> None:
    kernel, rows = build(target, way, "fp32", SHAPES[0], "tf32")
    check(kernel, target, tmp_path, matrices=True, rows=rows)


@pytest.mark.parametrize("way", ["forward", "x", "weight"])
@pytest.mark.parametrize("target", TARGETS)
def test_exact_float32_does_not_spill(target: str, way: str, tmp_path: Path) -> None:
    kernel, _ = build(target, way, "fp32", SHAPES[0], "ieee")
    check(kernel, target, tmp_path, matrices=False)


@pytest.mark.parametrize("target", TARGETS)
def test_the_sum_of_slices_compiles(target: str, tmp_path: Path) -> None:
    from fastrec.kernels.grouped_linear._triton import SUM_BLOCK, sum_slices

    pointers = {"parts_ptr": "*fp32", "out_ptr": "*bf16"}
    kernel = compiled(
        sum_slices, target, pointers, {"BLOCK": SUM_BLOCK, "ROUND": False}, ("slices",)
    )
    check(kernel, target, tmp_path, matrices=False)


def test_the_loads_of_the_next_terms_overlap_the_products() -> None:
    """The number of pipeline stages, from shared memory beyond one tile of each operand."""
    kernel, _ = build("sm_90", "forward", "bf16", (65536, 2, 256, 256), "ieee")
    config = heuristic(65536, 256, 256, 2, 2)
    one_tile = 2 * config.block_terms * (config.block_rows + config.block_cols)
    assert kernel.metadata.shared >= 2 * one_tile


def test_the_number_of_rows_compiles_few_kernels() -> None:
    configs = {heuristic(rows, 64, 64, 4, 2) for rows in range(1, 20_000)}
    assert len(configs) <= 8
    slices = {heuristic(64, 64, rows, 4, 2, sliced=True) for rows in range(1, 100_000)}
    assert all(config.block_rows == 64 for config in slices)
