"""Rivals of ``sparse_int8_linear``: torch fp32, and INT8 of FBGEMM and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastrec.nn import SparseInt8Linear
from rivals._common import Call, onnx_model, onnxruntime_call


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x_u8, packed = args
    scale, zero_point = kwargs["x_scale"], kwargs["x_zero_point"]
    x = (x_u8.float() - zero_point) * scale
    weight = packed.unpack()
    real = weight.float() * packed.scale[:, None]
    calls: dict[str, Call] = {"torch fp32": lambda: F.linear(x, real, kwargs["bias"]).relu_()}

    quantised = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    per_channel = torch.quantize_per_channel(
        real, packed.scale.double(), torch.zeros(packed.outputs, dtype=torch.int64), 0, torch.qint8
    )
    prepacked = torch.ops.quantized.linear_prepack(per_channel, kwargs["bias"])
    out_scale, out_zero_point = kwargs["out_scale"], kwargs["out_zero_point"]
    calls["torch int8 (FBGEMM)"] = lambda: torch.ops.quantized.linear_relu(
        quantised, prepacked, out_scale, out_zero_point
    )
    onnx = _qlinear_matmul(x_u8.numpy(), packed, weight, kwargs)
    ort = onnxruntime_call(onnx, {"x": x_u8.numpy()}, threads)
    return calls if ort is None else calls | {"onnxruntime int8": ort}


def prepared(args: Any, kwargs: dict[str, Any]) -> Call:
    """Our layer as a model runs it, its weight prepared once, like the rivals' prepacked ones."""
    x, packed = args
    layer = SparseInt8Linear(packed.inputs, packed.outputs, True, kwargs["activation"])
    layer.values, layer.group_index = packed.values, packed.group_index
    layer.panel_start, layer.w_scale, layer.bias = packed.panel_start, packed.scale, kwargs["bias"]
    layer.set_input_quantization(kwargs["x_scale"], kwargs["x_zero_point"])
    layer.set_output_quantization(kwargs["out_scale"], kwargs["out_zero_point"])
    return lambda: layer(x)


def _qlinear_matmul(
    x: np.ndarray, packed: Any, weight: torch.Tensor, kwargs: dict[str, Any]
) -> bytes | None:
    """u8 x s8 with per-channel scales; the u8 output clips at zero point 0, which is the ReLU.

    The bias is left out: a little less work than ours does.
    """
    try:
        from onnx import helper
    except ImportError:
        return None
    constants = {
        "x_scale": np.float32(kwargs["x_scale"]),
        "x_zero": np.uint8(kwargs["x_zero_point"]),
        "w": np.ascontiguousarray(weight.numpy().T),
        "w_scale": packed.scale.numpy(),
        "w_zero": np.zeros(packed.outputs, np.int8),
        "y_scale": np.float32(kwargs["out_scale"]),
        "y_zero": np.uint8(kwargs["out_zero_point"]),
    }
    node = helper.make_node("QLinearMatMul", ["x", *constants], ["y"])
    outputs = {"y": (np.uint8, (x.shape[0], packed.outputs))}
    return onnx_model([node], {"x": x}, outputs, constants)


def value(output: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The real numbers that u8 codes mean; float results clipped to what those can say."""
    output = torch.as_tensor(output)
    if kwargs.get("out") != "uint8":
        return output
    scale, zero_point = kwargs["out_scale"], kwargs["out_zero_point"]
    if output.is_quantized:
        return output.dequantize()
    if output.dtype == torch.uint8:
        return (output.float() - zero_point) * scale
    return output.clamp(-zero_point * scale, (255 - zero_point) * scale)
