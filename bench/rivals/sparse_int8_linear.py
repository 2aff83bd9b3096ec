"""Rivals of ``sparse_int8_linear``: INT8 of FBGEMM, oneDNN, ONNX Runtime and OpenVINO, and torch.

All but FBGEMM's block-sparse layer compute every group, the dropped ones included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastrec.kernels.sparse_int8_linear import _cpu
from fastrec.nn import SparseInt8Linear
from rivals._common import Call, named, onnx_model, onnxruntime_call, openvino_call


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x_u8, packed = args
    x = (x_u8.float() - kwargs["x_zero_point"]) * kwargs["x_scale"]
    real = packed.unpack().float() * packed.scale[:, None]
    bias = kwargs["bias"]
    half = (x.bfloat16(), real.bfloat16(), bias.bfloat16())
    return {
        "torch fp32": lambda: F.linear(x, real, bias).relu_(),
        "torch bf16": lambda: F.linear(*half).relu_(),
        **_torch_int8(x_u8, packed, kwargs),
        **_onnx_int8(x_u8, packed, kwargs, threads),
    }


def _torch_int8(x_u8: torch.Tensor, packed: Any, kwargs: dict[str, Any]) -> dict[str, Call]:
    scale, zero_point, bias = kwargs["x_scale"], kwargs["x_zero_point"], kwargs["bias"]
    out = kwargs["out_scale"], kwargs["out_zero_point"]
    x = torch._make_per_tensor_quantized_tensor(x_u8, scale, zero_point)
    no_zero_points = torch.zeros(packed.outputs, dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(
        packed.unpack(), packed.scale.double(), no_zero_points, 0
    )
    calls: dict[str, Call] = {}
    before = torch.backends.quantized.engine
    try:
        for engine, name in (("fbgemm", "FBGEMM"), ("onednn", "oneDNN")):
            if engine not in torch.backends.quantized.supported_engines:
                continue
            # The packed weight keeps the engine that it was packed for.
            torch.backends.quantized.engine = engine
            dense = torch.ops.quantized.linear_prepack(weight, bias)
            calls[f"torch int8 ({name})"] = lambda dense=dense: torch.ops.quantized.linear_relu(
                x, dense, *out
            )
        # The ops that torch.export's quantiser lowers to.
        lowered = torch.ops.onednn.qlinear_prepack(packed.unpack().t(), list(x_u8.shape))
        calls["torch int8 (oneDNN, export)"] = lambda: torch.ops.onednn.qlinear_pointwise(
            *(x_u8, scale, zero_point, lowered, packed.scale, no_zero_points.int(), bias),
            *(*out, torch.uint8, "relu", [], ""),
        )
        if "fbgemm" in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = "fbgemm"
            # Its kernel adds pairs of products in saturating 16 bits: 8-bit inputs come out wrong,
            # so it gets 7 bits, as torch's reduce_range says; x = 2 x7 - 1 or 2 x7.
            x7 = torch._make_per_tensor_quantized_tensor(
                ((x_u8.int() + 1) // 2).to(torch.uint8), 2 * scale, (zero_point + 1) // 2
            )
            sparse = torch.ops.sparse.qlinear_prepack(weight, bias, 1, 4)
            calls["torch int8 block-sparse 1x4 (FBGEMM, 7-bit activations)"] = lambda: (
                torch.ops.sparse.qlinear_relu(x7, sparse, *out)
            )
    finally:
        torch.backends.quantized.engine = before
    return calls


def _onnx_int8(
    x_u8: torch.Tensor, packed: Any, kwargs: dict[str, Any], threads: int
) -> dict[str, Call]:
    """QDQ graphs, which both runtimes fuse into one INT8 layer with bias, ReLU and requantisation.

    OpenVINO also gets the input shifted to s8 with zero point 0 and the difference in the bias: the
    same sums, and on some sizes its faster kernel (ONNX Runtime's is twenty times slower).
    """
    try:
        from onnx import helper
    except ImportError:
        return {}
    node = helper.make_node
    scale, zero_point = kwargs["x_scale"], kwargs["x_zero_point"]
    weight, bias, w_scale = packed.unpack(), kwargs["bias"], packed.scale
    shift = (scale * w_scale) * (128 - zero_point) * weight.int().sum(1)
    shared = {
        "x_scale": np.float32(scale),
        "w": weight.t().contiguous().numpy(),
        "w_scale": w_scale.numpy(),
        "w_zero": np.zeros(packed.outputs, np.int8),
        "y_scale": np.float32(kwargs["out_scale"]),
        "y_zero": np.uint8(kwargs["out_zero_point"]),
    }
    real = [
        node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["x_real"]),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_real"], axis=1),
    ]
    ending = [
        node("Relu", ["sum"], ["positive"]),
        node("QuantizeLinear", ["positive", "y_scale", "y_zero"], ["y"]),
    ]
    outputs = {"y": (np.uint8, (len(x_u8), packed.outputs))}

    def added(x: np.ndarray, zero: Any, offset: torch.Tensor) -> bytes | None:
        product = node("MatMul", ["x_real", "w_real"], ["product"])
        nodes = [*real, product, node("Add", ["product", "b"], ["sum"]), *ending]
        constants = shared | {"x_zero": zero, "b": offset.numpy()}
        return onnx_model(nodes, {"x": x}, outputs, constants)

    def gemm(x: np.ndarray) -> bytes | None:
        """With the bias in integers, as ONNX Runtime's QGemm wants it."""
        b_scale = scale * w_scale
        constants = shared | {
            "x_zero": np.uint8(zero_point),
            "b": (bias / b_scale).round().to(torch.int32).numpy(),
            "b_scale": b_scale.numpy(),
            "b_zero": np.zeros(packed.outputs, np.int32),
        }
        b_real = node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["b_real"], axis=0)
        nodes = [*real, b_real, node("Gemm", ["x_real", "w_real", "b_real"], ["sum"]), *ending]
        return onnx_model(nodes, {"x": x}, outputs, constants)

    def matmul(x: np.ndarray) -> bytes | None:
        """Without the bias, a little less work than ours: u8 output clips at zero point 0."""
        names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
        constants = shared | {"x_zero": np.uint8(zero_point)}
        return onnx_model([node("QLinearMatMul", names, ["y"])], {"x": x}, outputs, constants)

    u8, s8 = x_u8.numpy(), (x_u8.int() - 128).to(torch.int8).numpy()
    calls = {
        "onnxruntime int8": onnxruntime_call(gemm(u8), {"x": u8}, threads),
        "onnxruntime int8, no bias": onnxruntime_call(matmul(u8), {"x": u8}, threads),
        "openvino int8": openvino_call(added(u8, np.uint8(zero_point), bias), {"x": u8}, threads),
        "openvino int8, s8 input": openvino_call(
            added(s8, np.int8(0), bias + shift), {"x": s8}, threads
        ),
    }
    return named(calls)


def prepared(args: Any, kwargs: dict[str, Any]) -> Call:
    """Our layer as a model runs it, its weight prepared once, like the rivals' prepacked ones."""
    x, packed = args
    layer = SparseInt8Linear(packed.inputs, packed.outputs, True, kwargs["activation"])
    layer.values, layer.group_index = packed.values, packed.group_index
    layer.panel_start, layer.w_scale, layer.bias = packed.panel_start, packed.scale, kwargs["bias"]
    layer.set_input_quantization(kwargs["x_scale"], kwargs["x_zero_point"])
    layer.set_output_quantization(kwargs["out_scale"], kwargs["out_zero_point"])
    return lambda: layer(x)


def kernel(args: Any, kwargs: dict[str, Any]) -> Call:
    """The compiled kernel on the same weight, into one output."""
    x, packed = args
    output = torch.empty(len(x), packed.outputs, dtype=_cpu.OUT_DTYPES[kwargs["out"]])
    run = _cpu.prepare(packed, **kwargs)
    call = (x.data_ptr(), _cpu.DTYPE_CODES[x.dtype], x.numel(), output.data_ptr())

    def into_output() -> torch.Tensor:
        if not run(*call):
            raise ArithmeticError("a NaN in x")
        return output

    return into_output


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
