"""``window_sparse_attention`` compiled for GPUs that need not be there: matrix units, no spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ahead_of_time import TARGETS, check, compiled

from fastrec import env
from fastrec.kernels.window_sparse_attention._config import (
    LaunchConfig,
    block_dims,
    heuristic,
    is_short,
    short,
)

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter compiles nothing")

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def build(
    kernel: Any,
    target: str,
    dtype: str,
    dims: int,
    config: LaunchConfig,
    *,
    causal: bool = False,
    jagged: bool = False,
    precision: str = "ieee",
    **others: Any,
) -> Any:
    """The kernel as the op launches it; nothing is known of what depends on batch or length."""
    names = kernel.arg_names
    types = {name: f"*{dtype}" for name in names if name.endswith("_ptr")}
    types |= {name: "*fp32" for name in ("lse_ptr", "d_lse_ptr", "delta_ptr") if name in names}
    types |= {"bounds_ptr": "*i64", "far_ptr": "*i32", "far_starts_ptr": "*i32"}
    types |= {"lengths_ptr": "*i64", "seen_ptr": "*i8"}
    types |= {name: "fp32" for name in names if name.startswith("scale")}
    types |= {n: "i64" for n in names if n.startswith("stride_") and n[-1] in "bh"}
    constants: dict[str, Any] = {
        "CAUSAL": causal,
        "JAGGED": jagged,
        "HAS_LENGTHS": not jagged,
        "ALIGNED": 16 // ITEMSIZE[dtype] if dims % 8 == 0 else 1,
        "PRECISION": precision,
        "WIDEN": False,
        "ROUND": False,
        "D": dims,
        "BLOCK_D": block_dims(dims),
        "BLOCK_M": config.block_rows,
        "BLOCK_N": config.block_others,
        "BLOCK_F": 32,
        "FAR_STAGES": config.far_stages,
        **others,
    }
    constants = {name: value for name, value in constants.items() if name in names}
    numbers = tuple(n for n in names if n not in constants and not n.endswith("_ptr"))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compiled(kernel, target, types, constants, numbers, **options)


def forward(target: str, dtype: str, dims: int, rows: int, window: int, **options: Any) -> Any:
    from fastrec.kernels.window_sparse_attention._triton.forward_kernel import attention_forward

    config = heuristic(rows, window, dims, ITEMSIZE[dtype], aligned=dims % 8 == 0)
    kernel = build(attention_forward, target, dtype, dims, config, WITH_LSE=True, **options)
    return kernel, config.block_rows


def backward(target: str, dtype: str, dims: int, rows: int, window: int, **options: Any) -> Any:
    """The kernels by queries and by keys, and their rows."""
    from fastrec.kernels.window_sparse_attention._triton import backward_kernels as kernels

    aligned = dims % 8 == 0
    config = heuristic(rows, window, dims, ITEMSIZE[dtype], aligned=aligned, backward=True)
    queries = kernels.attention_backward_queries
    return (
        build(queries, target, dtype, dims, config, HAS_D_LSE=True, **options),
        build(kernels.attention_backward_keys, target, dtype, dims, config, **options),
        config.block_rows,
    )


# All kinds for one GPU, the widest sums of a common size for all.
KINDS: list[tuple[int, int, int, dict[str, Any]]] = [
    (16, 8192, 16, {"jagged": True}),
    (32, 100, 16, {}),
    (32, 20, 16, {}),
    (33, 8192, 64, {}),
    (128, 8192, 64, {"causal": True}),
    (129, 8192, 64, {"causal": True}),
    (256, 8192, 64, {}),
]
CASES = [(target, 64, 8192, 64, {}) for target in TARGETS]
CASES += [("sm_90", *kind) for kind in KINDS]


@pytest.mark.parametrize(("target", "dims", "rows", "window", "options"), CASES, ids=str)
def test_half_precision_runs_on_matrix_units(
    target: str, dims: int, rows: int, window: int, options: dict[str, Any], tmp_path: Path
) -> None:
    for dtype in ("bf16", "fp16") if dims == 64 else ("bf16",):
        kernel, block = forward(target, dtype, dims, rows, window, **options)
        check(kernel, target, tmp_path, matrices=True, rows=block)
    by_queries, by_keys, block = backward(target, "bf16", dims, rows, window, **options)
    for kernel in (by_queries, by_keys):
        check(kernel, target, tmp_path, matrices=True, rows=block)


@pytest.mark.parametrize(
    ("target", "dims"),
    [*((target, 64) for target in TARGETS), ("sm_90", 32), ("sm_90", 256)],
)
def test_exact_float32_does_not_spill(target: str, dims: int, tmp_path: Path) -> None:
    kernel, _ = forward(target, "fp32", dims, 8192, 64)
    for each in (kernel, *backward(target, "fp32", dims, 8192, 64)[:2]):
        check(each, target, tmp_path, matrices=False)


@pytest.mark.parametrize(
    ("target", "rows", "dims"),
    [*((target, 100, 32) for target in TARGETS), ("sm_90", 256, 64), ("sm_90", 40, 256)],
)
def test_a_short_sequence_takes_one_program(
    target: str, rows: int, dims: int, tmp_path: Path
) -> None:
    from fastrec.kernels.window_sparse_attention._triton.short_kernel import (
        attention_short_forward,
    )

    assert is_short(rows, dims, 2)
    config = short(rows, dims, 2)
    kernel = build(attention_short_forward, target, "bf16", dims, config, WITH_LSE=True)
    check(kernel, target, tmp_path, matrices=True, rows=config.block_rows)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_tf32_runs_on_matrix_units(target: str, tmp_path: Path) -> None:
    kernel, rows = forward(target, "fp32", 64, 8192, 64, precision="tf32")
    check(kernel, target, tmp_path, matrices=True, rows=rows)


def test_a_tile_of_far_positions_is_read_in_vectors() -> None:
    """Shifted by any distance, D = 64 in bfloat16 is eight loads or copies of 16 bytes a row."""
    kernel, _ = forward("sm_90", "bf16", 64, 8192, 64)
    ptx = kernel.asm["ptx"]
    assert "cp.async.cg.shared.global [" in ptx
    assert "ld.global.b16" not in ptx
    assert "ld.global.u16" not in ptx


def test_the_length_compiles_few_kernels() -> None:
    for backward in (False, True):
        configs = {heuristic(n, 16, 32, 2, backward=backward) for n in range(1, 20_000)}
        assert len(configs) <= 3
