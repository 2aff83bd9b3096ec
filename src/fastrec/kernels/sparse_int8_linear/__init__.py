"""``sparse_int8_linear``: u8 activations x block-sparse s8 weights with a fused epilogue.

    y[m, n] = act(x_scale * w_scale[n] * sum_k (x[m, k] - z) * w[n, k] + bias[n])

The weight keeps only its non-zero groups of 32 outputs x 4 inputs (:class:`PackedWeight`); a dense
weight is the same format with every group kept. Accumulators are exact int32. Source: the paper's
"quantisation of the non-zero weights", s = (max - min) / (2^b - 1), with b = 8.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import _gpu as gpus
from fastrec.kernels._compiled import cpu_can_run
from fastrec.kernels._cuda import cuda_can_run
from fastrec.kernels._registry import Backends, OpSpec, Signature, always
from fastrec.kernels._torch_op import define_op
from fastrec.kernels.dlpack import takes_arrays
from fastrec.kernels.sparse_int8_linear import _cpu, _gpu
from fastrec.kernels.sparse_int8_linear.packed import PackedWeight, check_vector
from fastrec.kernels.sparse_int8_linear.reference import sparse_int8_linear_reference
from fastrec.kernels.sparse_int8_linear.samples import compare, samples

__all__ = ["SPEC", "PackedWeight", "sparse_int8_linear"]


def triton_can_run(signature: Signature) -> str | None:
    """``can_run`` of the Triton kernel, which takes every dtype of the op."""
    return gpus.reason_missing(signature.device)


# `reference` is the definition and the last fallback.
BACKENDS = Backends(
    "sparse_int8_linear",
    {"cpu": cpu_can_run, "cuda": cuda_can_run, "triton": triton_can_run, "reference": always},
)


def check_quantisation(prefix: str, scale: float, zero_point: int) -> None:
    """Raises ArgumentError unless scale is finite and > 0 and zero_point lies in 0..255."""
    if not (math.isfinite(scale) and scale > 0):
        raise ArgumentError(f"{prefix}_scale", "a finite number > 0", scale)
    if not 0 <= zero_point <= 255:
        raise ArgumentError(f"{prefix}_zero_point", "an integer in 0..255", zero_point)


def check_epilogue(
    outputs: int,
    bias: torch.Tensor | None,
    activation: str | None,
    out_scale: float | None,
    out_zero_point: int | None,
) -> None:
    """Checks the arguments that do not depend on the input.

    Args:
        outputs: N.
        bias, activation, out_scale, out_zero_point: as in :func:`sparse_int8_linear`.

    Raises:
        ShapeError, DtypeError, ArgumentError: a bad one.
    """
    if bias is not None:
        check_vector("bias", bias, outputs)
        if not bool(torch.isfinite(bias).all()):
            raise ArgumentError("bias", "finite values", "a NaN or an infinity")
    if activation not in _cpu.ACTIVATION_CODES:
        raise ArgumentError("activation", "None, 'relu' or 'gelu'", activation)
    if out_scale is not None:
        if out_zero_point is None:
            raise ArgumentError("out_zero_point", "an integer in 0..255 beside out_scale", None)
        check_quantisation("out", out_scale, out_zero_point)


def check_input(x: torch.Tensor, inputs: int, device: torch.device) -> None:
    """Raises unless x is uint8, float32 or bfloat16 [..., K] on that device."""
    if x.dtype not in _cpu.DTYPE_CODES:
        raise DtypeError("x", "uint8, float32 or bfloat16", x.dtype)
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ShapeError("x", f"shape [..., {inputs}]", list(x.shape))
    if x.device != device:
        raise DeviceError("x", f"the weight's device {device}", x.device)


def check_numbers(x: torch.Tensor) -> None:
    """Raises ArgumentError if a float x holds a NaN: what the compiled kernel does on its own."""
    if x.is_floating_point() and bool(x.isnan().any()):
        raise ArgumentError("x", "numbers", "a NaN")


@takes_arrays
def sparse_int8_linear(
    x_u8: torch.Tensor,
    packed: PackedWeight,
    *,
    x_scale: float,
    x_zero_point: int,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    out: str | None = None,
    out_scale: float | None = None,
    out_zero_point: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Quantised linear layer over a packed, possibly sparse, s8 weight.

    Args:
        x_u8: uint8 [..., K]; or float32 or bfloat16 [..., K], which the kernel quantises on the
            way in.
        packed: the weight, N outputs x K inputs. It keeps the prepared kernel of its latest
            epilogues, so that calls with the same scales and the same bias cost little.
        x_scale, x_zero_point: real input = (x_u8 - x_zero_point) * x_scale.
        bias: float32 [N], added before the activation.
        activation: None, "relu" or "gelu" (the erf form, to 4.3e-7 of erf).
        out: None for float32, "bfloat16" for that rounded to nearest even, "uint8" to requantise
            with out_scale and out_zero_point.
        backend: None picks the best once per signature; "cpu", "cuda", "triton" or "reference"
            forces one.

    Returns:
        float32, bfloat16 or uint8 [..., N]. Not differentiable: train through
        ``fastrec.quantize_(model, QAT(step="prepare"))``.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument, a NaN in a float input
            (on a GPU, which would have to be waited for, a NaN counts as the lowest value instead).
        BackendError: the backend asked for can't run.
    """
    compiling = torch.compiler.is_compiling()
    key = (x_scale, x_zero_point, id(bias), activation, out, out_scale, out_zero_point, backend)
    held = None if compiling else packed._handles.get(key)
    if held is None or not held.is_current():
        epilogue: dict[str, Any] = {
            "x_scale": x_scale,
            "x_zero_point": x_zero_point,
            "bias": bias,
            "activation": activation,
            "out": out,
            "out_scale": out_scale,
            "out_zero_point": out_zero_point,
        }
        if compiling:
            return _traced(x_u8, packed, epilogue)
        if out not in _cpu.OUT_DTYPES:
            raise ArgumentError("out", "None, 'bfloat16' or 'uint8'", out)
        if (out == "uint8") != (out_scale is not None):
            raise ArgumentError("out_scale", "a number exactly where out='uint8'", out_scale)
        check_quantisation("x", x_scale, x_zero_point)
        check_epilogue(packed.outputs, bias, activation, out_scale, out_zero_point)
        signature = Signature(x_u8.device.type, str(x_u8.dtype).removeprefix("torch."))
        chosen = BACKENDS.choose(signature, backend)
        if chosen == "reference":
            check_input(x_u8, packed.inputs, packed.values.device)
            check_numbers(x_u8)
            return sparse_int8_linear_reference(x_u8, packed, **epilogue)
        held = _Held(packed, epilogue, chosen)
        if held.versions is not None and all(type(part) in _PLAIN for part in key):
            if len(packed._handles) >= _MAX_HANDLES:
                packed._handles.clear()
            packed._handles[key] = held
    if held.backend != "cpu":
        check_input(x_u8, packed.inputs, packed.values.device)
        return _gpu.call(held.prepared, x_u8, held.backend)
    shape = x_u8.shape
    if not (x_u8.is_cpu and x_u8.dtype in _cpu.DTYPE_CODES and shape and shape[-1] == held.inputs):
        check_input(x_u8, packed.inputs, packed.values.device)
    return _cpu.call(held.run, x_u8, held.outputs, held.out_dtype)


_MAX_HANDLES = 8
_PLAIN = (float, int, str, type(None))


class _Held:
    """A prepared handle with what it borrows and the versions that it was made from."""

    def __init__(self, packed: PackedWeight, epilogue: dict[str, Any], backend: str) -> None:
        bias = epilogue["bias"]
        self.backend = backend
        self.versions = _versions(packed, bias)
        # Both: the key holds the address of the one, the handle the memory of the other.
        self.bias = bias
        if backend == "cpu":
            self.contiguous_bias = None if bias is None else bias.contiguous()
            self.run = _cpu.prepare(packed, **epilogue | {"bias": self.contiguous_bias})
        else:
            self.prepared = _gpu.prepare(packed, **epilogue, backend=backend)
        self.inputs, self.outputs = packed.inputs, packed.outputs
        self.out_dtype = _cpu.OUT_DTYPES[epilogue["out"]]
        self._watched = [*packed.parts(), *(() if bias is None else (bias,))]

    def is_current(self) -> bool:
        """Whether nothing that the handle was made from has been written to since."""
        return self.versions == tuple([part._version for part in self._watched])


def _versions(packed: PackedWeight, bias: torch.Tensor | None) -> tuple[Any, ...] | None:
    parts = packed.versions()
    if parts is None or bias is None:
        return parts
    return None if bias.is_inference() else (*parts, bias._version)


def _traced(x: torch.Tensor, packed: PackedWeight, epilogue: dict[str, Any]) -> torch.Tensor:
    def scalar(name: str, dtype: torch.dtype) -> torch.Tensor | None:
        return None if epilogue[name] is None else torch.tensor(epilogue[name], dtype=dtype)

    result: torch.Tensor = torch.ops.fastrec.sparse_int8_linear(
        x,
        packed.values,
        packed.group_index,
        packed.panel_start,
        packed.scale,
        epilogue["bias"],
        scalar("x_scale", torch.float64),
        scalar("x_zero_point", torch.int32),
        epilogue["activation"],
        scalar("out_scale", torch.float64),
        scalar("out_zero_point", torch.int32),
        out=epilogue["out"],
    )
    return result


def _op(
    x: torch.Tensor,
    values: torch.Tensor,
    group_index: torch.Tensor,
    panel_start: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    x_zero_point: torch.Tensor,
    activation: str | None,
    out_scale: torch.Tensor | None,
    out_zero_point: torch.Tensor | None,
    *,
    out: str | None = None,
) -> torch.Tensor:
    return sparse_int8_linear(
        x,
        _packed_of(values, group_index, panel_start, w_scale, x.shape[-1]),
        x_scale=x_scale.item(),
        x_zero_point=int(x_zero_point),
        bias=bias,
        activation=activation,
        out=out if out_scale is None else "uint8",
        out_scale=None if out_scale is None else out_scale.item(),
        out_zero_point=None if out_zero_point is None else int(out_zero_point),
    )


# Checking the parts of a weight costs more than a small layer, so that a compiled model does it
# once: by the identity of `values`, until that dies. The entry holds aliases, which keep the memory
# and not the tensor.
_CHECKED: dict[int, tuple[tuple[Any, ...], PackedWeight]] = {}


def _packed_of(
    values: torch.Tensor,
    group_index: torch.Tensor,
    panel_start: torch.Tensor,
    w_scale: torch.Tensor,
    inputs: int,
) -> PackedWeight:
    parts = (values, group_index, panel_start, w_scale)
    key: tuple[Any, ...] | None = None
    if not any(part.is_inference() for part in parts):  # those count no versions
        key = (inputs, *((id(part), part.data_ptr(), part._version) for part in parts))
        known = _CHECKED.get(id(values))
        if known is not None and known[0] == key:
            return known[1]
    packed = PackedWeight.from_parts(
        values.detach(),
        group_index.detach(),
        panel_start.detach(),
        w_scale.detach(),
        len(w_scale),
        inputs,
    )
    if key is not None:
        if id(values) not in _CHECKED:
            weakref.finalize(values, _CHECKED.pop, id(values), None).atexit = False
        _CHECKED[id(values)] = key, packed
    return packed


def _op_fake(
    x: torch.Tensor, *parts: torch.Tensor | str | None, out: str | None = None
) -> torch.Tensor:
    *_, w_scale, _bias, _x_scale, _x_zero_point, _activation, out_scale, _out_zero_point = parts
    assert isinstance(w_scale, torch.Tensor)
    dtype = _cpu.OUT_DTYPES[out] if out_scale is None else torch.uint8
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]), dtype=dtype)


# The torch op, which torch.compile and torch.export see. Eager callers bypass it (SparseInt8Linear
# calls a prepared handle), because the dispatcher costs more than a small layer. The scales are 0-d
# tensors, because a traced module holds buffers, not numbers.
define_op(
    "sparse_int8_linear(Tensor x, Tensor values, Tensor group_index, Tensor panel_start, "
    "Tensor w_scale, Tensor? bias, Tensor x_scale, Tensor x_zero_point, str? activation, "
    "Tensor? out_scale, Tensor? out_zero_point, *, str? out=None) -> Tensor",
    _op,
    _op_fake,
    devices=("CPU", "CUDA"),
)


SPEC = OpSpec(
    op_id="sparse_int8_linear",
    summary="u8 activations x block-sparse s8 weights, fused bias, activation and requantise",
    function=sparse_int8_linear,
    reference=sparse_int8_linear_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)
