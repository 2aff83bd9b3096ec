"""Rivals of ``separable_projection``: torch's depthwise Conv1d and Linear, eager and compiled."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastrec.kernels import separable_projection
from rivals._common import (
    Call,
    compiled,
    forward_backward,
    named,
    onnx_model,
    onnxruntime_call,
    openvino_call,
)


def _layer(
    x: torch.Tensor, taps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """As a user would write it; a grouped projection as its dense, block-diagonal weight."""
    width = taps.shape[2]
    hidden = F.conv1d(x.transpose(1, 2), taps, padding=width // 2, groups=len(taps))
    return F.linear(hidden.transpose(1, 2), weight, bias)


def _shifts(
    x: torch.Tensor, depthwise: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The convolution as shifted rows times taps, which a compiler can fuse; no transposes."""
    width, length = depthwise.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width // 2, width // 2))
    hidden = padded[:, :length] * depthwise[:, 0]
    for tap in range(1, width):
        hidden = hidden + padded[:, tap : tap + length] * depthwise[:, tap]
    return F.linear(hidden, weight, bias)


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x, depthwise, pointwise, bias = args
    taps, weight = depthwise.unsqueeze(1), torch.block_diag(*pointwise)
    calls = {
        "torch conv1d + linear": lambda: _layer(x, taps, weight, bias),
        "torch.compile conv1d + linear": compiled(_layer, x, taps, weight, bias),
        "torch.compile shifts + linear": compiled(_shifts, x, depthwise, weight, bias),
    }
    if x.dtype is not torch.float32:
        return {f"{name} bf16": call for name, call in calls.items()}
    return calls | _engines(x, taps, weight, bias, threads)


def _engines(
    x: torch.Tensor,
    taps: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    threads: int,
) -> dict[str, Call]:
    try:
        from onnx import helper
    except ImportError:
        return {}
    node, side = helper.make_node, taps.shape[2] // 2
    nodes = [
        node("Transpose", ["x"], ["channels"], perm=[0, 2, 1]),
        node("Conv", ["channels", "taps"], ["hidden"], group=len(taps), pads=[side, side]),
        node("Transpose", ["hidden"], ["rows"], perm=[0, 2, 1]),
        node("MatMul", ["rows", "w"], ["projected"]),
        node("Add", ["projected", "b"], ["y"]),
    ]
    offset = torch.zeros(len(weight)) if bias is None else bias
    constants = {
        "taps": taps.numpy(),
        "w": weight.T.contiguous().numpy(),
        "b": offset.numpy(),
    }
    feed = {"x": x.numpy()}
    model = onnx_model(
        nodes, feed, {"y": (feed["x"].dtype, (*x.shape[:2], len(weight)))}, constants
    )
    return named(
        onnxruntime=onnxruntime_call(model, feed, threads),
        openvino=openvino_call(model, feed, threads),
    )


def training(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x, depthwise, pointwise, bias = args
    leaves = (x, depthwise, pointwise) if bias is None else (x, depthwise, pointwise, bias)

    def layer(
        x: torch.Tensor, depthwise: torch.Tensor, pointwise: torch.Tensor, *bias: torch.Tensor
    ) -> torch.Tensor:
        weight = torch.block_diag(*pointwise)
        return _layer(x, depthwise.unsqueeze(1), weight, *(bias or (None,)))

    return {
        "fastrec": forward_backward(separable_projection, leaves),
        "torch conv1d + linear": forward_backward(layer, leaves),
    }
