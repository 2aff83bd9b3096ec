"""Rivals of ``layer_norm_quantize``: torch in steps, torch.compile of the steps, OpenVINO and ONNX
Runtime on the same graph."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rivals._common import (
    Call,
    codes,
    compiled,
    named,
    onnx_model,
    onnxruntime_call,
    openvino_call,
    quantised,
)


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x, weight, bias = args
    residual, scale = kwargs.get("residual"), kwargs.get("out_scale")
    zero_point, dims = kwargs.get("out_zero_point", 0), x.shape[-1]

    def normed(x: torch.Tensor, end: Any) -> torch.Tensor:
        y = F.layer_norm(x if residual is None else x + residual, (dims,), weight, bias)
        return y if scale is None else end(y, scale, zero_point)

    model, feed = _graph(x, weight, bias, residual, scale, zero_point)
    return named(
        torch_eager=lambda: normed(x, quantised),
        torch_compile=compiled(normed, x, codes),
        onnxruntime=onnxruntime_call(model, feed, threads),
        openvino=openvino_call(model, feed, threads),
    )


def _graph(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    scale: float | None,
    zero_point: int,
) -> tuple[bytes | None, dict[str, Any]]:
    import numpy as np

    try:
        from onnx import helper
    except ImportError:
        return None, {}
    feed = {"x": x.numpy()}
    constants: dict[str, Any] = {"w": weight.numpy(), "b": bias.numpy()}
    nodes, source = [], "x"
    if residual is not None:
        feed["r"], source = residual.numpy(), "s"
        nodes.append(helper.make_node("Add", ["x", "r"], ["s"]))
    norm = "n" if scale is not None else "y"
    nodes.append(helper.make_node("LayerNormalization", [source, "w", "b"], [norm], epsilon=1e-5))
    if scale is not None:
        constants |= {"scale": np.float32(scale), "zero": np.uint8(zero_point)}
        nodes.append(helper.make_node("QuantizeLinear", ["n", "scale", "zero"], ["y"]))
    dtype = np.float32 if scale is None else np.uint8
    return onnx_model(nodes, feed, {"y": (dtype, tuple(x.shape))}, constants), feed


def value(output: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Norms or codes."""
    output = torch.as_tensor(output)
    return output.int_repr() if output.is_quantized else output
