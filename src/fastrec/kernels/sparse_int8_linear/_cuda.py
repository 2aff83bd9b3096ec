"""Glue to the CUDA kernel of ``csrc/cuda/sparse_int8_linear``."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import astuple

import torch

from fastrec.kernels import _cuda, _tuning
from fastrec.kernels._gpu import device_of, power_of_two
from fastrec.kernels.sparse_int8_linear._config import (
    CUDA_CONFIGS,
    CudaConfig,
    cuda_configs,
    cuda_heuristic,
)
from fastrec.kernels.sparse_int8_linear._cpu import ACTIVATION_CODES, DTYPE_CODES
from fastrec.kernels.sparse_int8_linear._device import DeviceWeight
from fastrec.kernels.sparse_int8_linear._gpu import Prepared

HEADER = "sparse_int8_linear/sparse_int8_linear.cuh"


class Params(ctypes.Structure):
    """``Params`` of params.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "values", "offset", "step_start")),
        *((name, ctypes.c_void_p) for name in ("start", "scale", "bias", "meta")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "panels", "chunks")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "y_dtype", "activation")),
        *((name, ctypes.c_int32) for name in ("x_zero_point", "y_zero_point")),
        *((name, ctypes.c_float) for name in ("x_inverse_scale", "y_inverse_scale")),
        *((name, ctypes.c_int32) for name in ("x_alignment", "y_alignment")),
    )


def params_of(prepared: Prepared, x: torch.Tensor, y: torch.Tensor) -> Params:
    """Of contiguous x [M, K] and y [M, N]."""
    weight = prepared.weight
    return Params(
        x=x.data_ptr(),
        y=y.data_ptr(),
        values=weight.values.data_ptr(),
        offset=weight.offset.data_ptr(),
        step_start=weight.step_start.data_ptr(),
        start=prepared.start.data_ptr(),
        scale=prepared.scale.data_ptr(),
        bias=prepared.bias.data_ptr(),
        meta=None if weight.meta is None else weight.meta.data_ptr(),
        rows=x.shape[0],
        outputs=weight.outputs,
        inputs=weight.inputs,
        panels=weight.panels,
        chunks=weight.chunks,
        x_dtype=DTYPE_CODES[x.dtype],
        y_dtype=DTYPE_CODES[y.dtype],
        activation=ACTIVATION_CODES[prepared.activation],
        x_zero_point=prepared.x_zero_point,
        y_zero_point=prepared.y_zero_point,
        x_inverse_scale=prepared.x_inverse_scale,
        y_inverse_scale=prepared.y_inverse_scale,
        x_alignment=_alignment(x),
        y_alignment=_alignment(y),
    )


def _alignment(rows: torch.Tensor) -> int:
    """Bytes, 16, 8, 4 or 1, at whose multiples every row of a contiguous matrix begins."""
    together = rows.data_ptr() | rows.shape[1] * rows.element_size()
    return next(bytes_ for bytes_ in (16, 8, 4, 1) if together % bytes_ == 0)


def kernel_name(config: CudaConfig) -> str:
    """The instantiation as C++ writes it."""
    return f"fastrec::sparse_int8_linear::multiply<{template_arguments(config)}>"


def template_arguments(config: CudaConfig) -> str:
    """The arguments as params.cuh lists them."""
    return ", ".join(str(value).lower() for value in astuple(config))


@functools.cache
def _compiled_index(config: CudaConfig) -> int:
    module = _cuda.compiled()
    assert module is not None
    found: list[list[int]] = module.sparse_int8_linear.configurations()
    return found.index([int(value) for value in astuple(config)])


@functools.cache
def _nvrtc(config: CudaConfig) -> _cuda.Launch:
    return _cuda.nvrtc_kernel(HEADER, kernel_name(config))


@functools.cache
def table(device: int) -> _tuning.Table:
    """The tuned configurations of a GPU."""
    return _tuning.Table(
        "sparse_int8_linear", _tuning.gpu_name(device), _cuda.source(HEADER), _cuda.NVRTC_OPTIONS
    )


def shape_key(rows: int, panels: int, steps: int, paired: bool, two_four: bool) -> str:
    """The key of a shape in the table; rows count in powers of two."""
    return f"{power_of_two(rows, 8, 1 << 30)} {panels} {steps} {int(paired)} {int(two_four)}"


@functools.lru_cache(maxsize=4096)
def choose(
    rows: int, panels: int, steps: int, paired: bool, two_four: bool, device: int
) -> CudaConfig:
    """The tuned configuration, else the heuristic's; decided once."""
    key = shape_key(rows, panels, steps, paired, two_four)
    known = table(device).find(key, cuda_configs(paired, two_four))
    return known or cuda_heuristic(rows, panels, paired, two_four)


def chosen(weight: DeviceWeight, rows: int, device: int) -> CudaConfig:
    """:func:`choose` for a weight."""
    return choose(rows, weight.panels, weight.steps, weight.paired, weight.two_four, device)


def tune(prepared: Prepared, x: torch.Tensor, y: torch.Tensor) -> CudaConfig:
    """Times every configuration on this call, keeps the fastest for its shape in the user's cache
    and returns it."""
    weight, device = prepared.weight, torch.cuda.current_device()
    best = _tuning.fastest(
        cuda_configs(weight.paired, weight.two_four),
        lambda config: _tuning.device_time_ms(lambda: run(prepared, x, y, config)),
    )
    key = shape_key(x.shape[0], weight.panels, weight.steps, weight.paired, weight.two_four)
    table(device).keep(key, best)
    choose.cache_clear()
    return best


def run(
    prepared: Prepared, x: torch.Tensor, y: torch.Tensor, config: CudaConfig | None = None
) -> None:
    """y [M, N] of x [M, K], both contiguous, on torch's current stream; M > 0."""
    weight = prepared.weight
    rows = x.shape[0]
    if config is None:
        config = chosen(weight, rows, x.device.index)
    params = params_of(prepared, x, y)
    with device_of(x):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        module = _cuda.compiled()
        if module is not None and config in CUDA_CONFIGS:
            module.sparse_int8_linear.launch(_compiled_index(config), params, stream)
        else:
            _nvrtc(config)(
                (config.blocks(rows, weight.panels),),
                (config.threads,),
                params,
                config.shared_bytes,
                stream,
            )
