"""What each op is held against: the same work, the same inputs, the same threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastrec.nn import SparseInt8Linear

Call = Callable[[], Any]


def sparse_int8_linear(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """torch fp32, and dense INT8 of FBGEMM and ONNX Runtime (neither skips zero groups)."""
    x_u8, packed = args
    scale, zero_point = kwargs["x_scale"], kwargs["x_zero_point"]
    x = (x_u8.float() - zero_point) * scale
    weight = packed.unpack()
    real = weight.float() * packed.scale[:, None]
    rivals: dict[str, Call] = {"torch fp32": lambda: F.linear(x, real, kwargs["bias"]).relu_()}

    quantised = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    per_channel = torch.quantize_per_channel(
        real, packed.scale.double(), torch.zeros(packed.outputs, dtype=torch.int64), 0, torch.qint8
    )
    prepacked = torch.ops.quantized.linear_prepack(per_channel, kwargs["bias"])
    out_scale, out_zero_point = kwargs["out_scale"], kwargs["out_zero_point"]
    rivals["torch int8 (FBGEMM)"] = lambda: torch.ops.quantized.linear_relu(
        quantised, prepacked, out_scale, out_zero_point
    )
    session = _onnx_session(packed, weight, kwargs, threads)
    if session is not None:
        feed = {"x": x_u8.numpy()}
        rivals["onnxruntime int8"] = lambda: session.run(None, feed)
    return rivals


def prepacked(args: Any, kwargs: dict[str, Any]) -> Call:
    """Our layer as a model runs it, its weight prepared once, like the rivals' prepacked ones."""
    x, packed = args
    layer = SparseInt8Linear(packed.inputs, packed.outputs, True, kwargs["activation"])
    layer.values, layer.group_index = packed.values, packed.group_index
    layer.panel_start, layer.w_scale, layer.bias = packed.panel_start, packed.scale, kwargs["bias"]
    layer.set_input_quantization(kwargs["x_scale"], kwargs["x_zero_point"])
    layer.set_output_quantization(kwargs["out_scale"], kwargs["out_zero_point"])
    return lambda: layer(x)


def _onnx_session(
    packed: Any, weight: torch.Tensor, kwargs: dict[str, Any], threads: int
) -> Any | None:
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, value: np.ndarray) -> Any:
        return numpy_helper.from_array(value, name)

    # QLinearMatMul over u8 x s8 with per-channel scales; its u8 output clips at the zero point,
    # which for zero point 0 is the ReLU. The bias is left out: a little less work than ours does.
    constants = [
        constant("x_scale", np.float32(kwargs["x_scale"])),
        constant("x_zero", np.uint8(kwargs["x_zero_point"])),
        constant("w", np.ascontiguousarray(weight.numpy().T)),
        constant("w_scale", packed.scale.numpy()),
        constant("w_zero", np.zeros(packed.outputs, np.int8)),
        constant("y_scale", np.float32(kwargs["out_scale"])),
        constant("y_zero", np.uint8(kwargs["out_zero_point"])),
    ]
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    graph = helper.make_graph(
        [helper.make_node("QLinearMatMul", names, ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["M", packed.inputs])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, ["M", packed.outputs])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def padded_attention(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """torch's fused attention, plain and with a padding mask."""
    q, k, v = args
    mask = torch.zeros(q.shape[0], 1, 1, k.shape[2])
    return {
        "torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch SDPA + mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }


def int8_embedding(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """torch on the same int8 table, and on a float table four times as large."""
    ids, table, scale = args
    column, real = scale[:, None], table.float() * scale[:, None]
    return {
        "torch int8 rows x scale": lambda: F.embedding(ids, table) * F.embedding(ids, column),
        "torch fp32 table": lambda: F.embedding(ids, real),
    }


RIVALS = {
    "int8_embedding": int8_embedding,
    "padded_attention": padded_attention,
    "sparse_int8_linear": sparse_int8_linear,
}
# Ops whose weight is prepared once: what is timed instead of the public function.
PREPARED = {"sparse_int8_linear": prepacked}
