"""Glue to the compiled CPU kernels of ``csrc/cpu/sparse_int8_linear``."""

from __future__ import annotations

from typing import Any

import torch

from fastrec.errors import ArgumentError
from fastrec.kernels import _compiled
from fastrec.kernels.sparse_int8_linear.packed import PackedWeight

# The order of the enum in sparse_int8_linear.h.
ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2}


def prepare(
    packed: PackedWeight,
    *,
    x_scale: float,
    x_zero_point: int,
    bias: torch.Tensor | None,
    activation: str | None,
    out_scale: float | None,
    out_zero_point: int | None,
) -> Any:
    """A compiled handle that runs this weight with this epilogue.

    It borrows the tensors' memory: the caller keeps ``packed`` and ``bias`` alive and unchanged.
    """
    return _compiled.native().sparse_int8_linear.Prepared(
        values=packed.values.data_ptr(),
        group_index=packed.group_index.data_ptr(),
        panel_start=packed.panel_start.data_ptr(),
        scale=packed.scale.data_ptr(),
        sum=packed.sum.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        outputs=packed.outputs,
        inputs=packed.inputs,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        activation=ACTIVATION_CODES[activation],
        y_u8=out_scale is not None,
        y_scale=1.0 if out_scale is None else out_scale,
        y_zero_point=0 if out_zero_point is None else out_zero_point,
    )


def run(prepared: Any, x: torch.Tensor, out: torch.Tensor, inputs: int) -> None:
    """Runs a prepared weight on x [..., K] (float32 or uint8, contiguous) into ``out`` [..., N]."""
    rows = x.numel() // inputs
    if not prepared.run(x.data_ptr(), x.dtype is torch.float32, rows, out.data_ptr()):
        raise ArgumentError("x", "numbers", "a NaN")
