"""``pointwise_attention`` compiled for GPUs that need not be there: matrix units, no spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ahead_of_time import check, compiled

from fastrec import env
from fastrec.kernels.pointwise_attention._config import block_dims, heuristic

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter compiles nothing")

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
INTEGERS = ("bounds", "targets", "edges", "times", "query_times")
TABLES = ("position", "time", "d_position", "d_time")


def build(
    kernel: Any, target: str, dtype: str, dims: int, value_dims: int, **constants: Any
) -> tuple[Any, int]:
    """The kernel as the op launches it on long sequences, and the rows of its tile."""
    names = kernel.arg_names
    types = {name: f"*{dtype}" for name in names if name.endswith("_ptr")}
    types |= {f"{name}_ptr": "*i64" for name in INTEGERS}
    types |= {f"{name}_ptr": "*fp32" for name in TABLES}
    types |= {"scale": "fp32", "inverse_norm": "fp32"}
    types |= {n: "i64" for n in names if n.startswith("stride_") and n[-1] in "bh"}
    aligned = dims % 8 == value_dims % 8 == 0
    config = heuristic(
        4096,
        max(dims, value_dims),
        ITEMSIZE[dtype],
        aligned=aligned,
        backward="backward" in kernel.fn.__name__,
    )
    options = {"JAGGED": False, "CAUSAL": True, "HAS_POSITION": True, "HAS_TIME": True} | constants
    options |= {
        "HAS_LENGTHS": not options["JAGGED"],
        "HAS_TARGETS": True,
        "STEPS": 8,
        "ALIGNED": 16 // ITEMSIZE[dtype] if aligned else 1,
        "PRECISION": "ieee",
        "WIDEN": False,
        "ROUND": False,
        "D": dims,
        "DV": value_dims,
        "BLOCK_D": block_dims(dims),
        "BLOCK_DV": block_dims(value_dims),
        "BLOCK_M": config.block_rows,
        "BLOCK_N": config.block_others,
    }
    types = {name: kind for name, kind in types.items() if name in names}
    numbers = tuple(n for n in names if n not in options and not n.endswith("_ptr"))
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return compiled(kernel, target, types, options, numbers, **launch), config.block_rows


CASES: list[tuple[str, str, int, int, dict[str, Any]]] = [
    ("sm_80", "bf16", 64, 64, {}),
    ("sm_90", "bf16", 64, 64, {}),
    ("sm_90", "fp16", 32, 32, {"JAGGED": True}),
    ("sm_90", "bf16", 128, 128, {"HAS_TIME": False, "CAUSAL": False}),
    ("sm_90", "bf16", 25, 33, {}),
    ("sm_90", "bf16", 256, 256, {}),
    ("sm_80", "fp32", 64, 64, {}),
    ("sm_90", "fp32", 64, 64, {}),
]


@pytest.mark.parametrize(("target", "dtype", "dims", "value_dims", "constants"), CASES, ids=str)
@pytest.mark.parametrize("name", ["forward", "backward_queries", "backward_keys"])
def test_matrix_units_and_no_spills(
    name: str,
    target: str,
    dtype: str,
    dims: int,
    value_dims: int,
    constants: dict[str, Any],
    tmp_path: Path,
) -> None:
    from fastrec.kernels.pointwise_attention._triton import kernels

    source = getattr(kernels, f"pointwise_{name}")
    kernel, rows = build(source, target, dtype, dims, value_dims, **constants)
    check(kernel, target, tmp_path, matrices=dtype != "fp32", rows=rows)


def test_the_length_compiles_few_kernels() -> None:
    for backward in (False, True):
        configs = {heuristic(n, 64, 2, backward=backward) for n in range(1, 20_000)}
        assert len(configs) <= 3
