"""Glue to the compiled CPU kernels of ``csrc/cpu/sparse_int8_linear``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastrec.errors import ArgumentError
from fastrec.kernels import _compiled
from fastrec.kernels.sparse_int8_linear.packed import PackedWeight

# The order of the enums in sparse_int8_linear.h.
ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2}
DTYPE_CODES = {torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2}
OUT_DTYPES = {None: torch.float32, "uint8": torch.uint8, "bfloat16": torch.bfloat16}

# (address of x, code of its dtype, elements of x, address of the result) -> False for a NaN in x.
Run = Callable[[int, int, int, int], bool]


def prepare(
    packed: PackedWeight,
    *,
    x_scale: float,
    x_zero_point: int,
    bias: torch.Tensor | None,
    activation: str | None,
    out: str | None,
    out_scale: float | None,
    out_zero_point: int | None,
) -> Run:
    """A compiled handle that runs this weight with this epilogue.

    It borrows the tensors' memory: the caller keeps ``packed`` and ``bias`` (contiguous, as the
    parts of ``packed`` are) alive and unchanged.
    """
    handle: Any = _compiled.native().sparse_int8_linear.Prepared(
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
        y_dtype=DTYPE_CODES[OUT_DTYPES[out]],
        y_scale=1.0 if out_scale is None else out_scale,
        y_zero_point=0 if out_zero_point is None else out_zero_point,
    )
    run: Run = handle.run
    return run


def call(run: Run, x: torch.Tensor, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Runs a prepared weight on a checked x [..., K]; returns [..., outputs] of ``dtype``."""
    if not x.is_contiguous():
        x = x.contiguous()
    # Sizes one by one: torch takes half a microsecond longer over a tuple of them.
    if x.dtype is dtype:
        result = x.new_empty(*x.shape[:-1], outputs)
    else:
        result = torch.empty(*x.shape[:-1], outputs, dtype=dtype)
        if not result.is_cpu:  # the caller's default device; naming ours always costs as much
            result = torch.empty(*x.shape[:-1], outputs, dtype=dtype, device="cpu")
    if not run(x.data_ptr(), DTYPE_CODES[x.dtype], x.numel(), result.data_ptr()):
        raise ArgumentError("x", "numbers", "a NaN")
    return result
