"""The fused attention block compiled for GPUs that need not be there: matrix units, no spills."""

from __future__ import annotations

from pathlib import Path

import pytest
from ahead_of_time import TARGETS, check, compiled

from fastrec import env
from fastrec.kernels.window_sparse_attention._config import BLOCK_ROWS, BLOCK_TILE

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter compiles nothing")


# Before sm_90 it would spill, and the op composes the three instead.
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_80"])
def test_the_canonical_ranker_s_block(target: str, tmp_path: Path) -> None:
    from fastrec.kernels.window_sparse_attention._triton.block_kernel import attention_block

    types = {name: "*bf16" for name in attention_block.arg_names if name.endswith("_ptr")}
    types |= {"lengths_ptr": "*i64", "seen_ptr": "*i8", "scale_log2": "fp32", "stride_xb": "i64"}
    constants = {"HAS_BIAS": True, "HAS_LENGTHS": True, "ALIGNED": 8, "PRECISION": "ieee"}
    constants |= {"WIDEN": False, "ROUND": False, "H": 4, "D": 32, "BLOCK_D": 32, "BLOCK_E": 128}
    constants |= {"BLOCK_M": BLOCK_TILE, "BLOCK_N": BLOCK_ROWS}
    numbers = ("L", "tiles", "stride_xb", "stride_xl", "scale_log2")
    options = {"num_warps": 8, "num_stages": 1}
    kernel = compiled(attention_block, target, types, constants, numbers, **options)
    check(kernel, target, tmp_path, matrices=True, rows=BLOCK_TILE)
