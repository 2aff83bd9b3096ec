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


def _channels_last(
    x: torch.Tensor, depthwise: torch.Tensor, pointwise: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Both as convolutions of an image one row high, whose channels-last layout x already has: no
    transposes, and oneDNN's kernels for it, 10 times as fast as Conv1d's."""
    channels, width = depthwise.shape
    taps = depthwise.view(channels, 1, 1, width)
    image = x.transpose(1, 2).unsqueeze(2)
    hidden = F.conv2d(image, taps, padding=(0, width // 2), groups=channels)
    kernel = pointwise.reshape(-1, pointwise.shape[2], 1, 1)
    y = F.conv2d(hidden, kernel, bias, groups=len(pointwise))
    return y.squeeze(2).transpose(1, 2)


def _shifts(
    x: torch.Tensor, depthwise: torch.Tensor, pointwise: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The convolution as shifted rows times taps, which a compiler can fuse; no transposes."""
    width, length = depthwise.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width // 2, width // 2))
    hidden = padded[:, :length] * depthwise[:, 0]
    for tap in range(1, width):
        hidden = hidden + padded[:, tap : tap + length] * depthwise[:, tap]
    if len(pointwise) == 1:
        return F.linear(hidden, pointwise[0], bias)
    by_group = hidden.flatten(0, 1).unflatten(1, (len(pointwise), -1))
    y = torch.einsum("mgi,goi->mgo", by_group, pointwise).reshape(*x.shape[:2], -1)
    return y if bias is None else y + bias


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x, depthwise, pointwise, bias = args
    taps, weight = depthwise.unsqueeze(1), torch.block_diag(*pointwise)
    calls = {
        "torch conv1d + linear": lambda: _layer(x, taps, weight, bias),
        "torch channels-last conv2d": lambda: _channels_last(*args),
        "torch.compile conv1d + linear": compiled(_layer, x, taps, weight, bias),
        "torch.compile channels-last conv2d": compiled(_channels_last, *args),
        "torch.compile shifts + linear": compiled(_shifts, *args),
    }
    if x.dtype is not torch.float32:
        return named({f"{name} bf16": call for name, call in calls.items()})
    return named(calls | _engines(x, taps, pointwise, bias, threads))


def _engines(
    x: torch.Tensor,
    taps: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor | None,
    threads: int,
) -> dict[str, Call | None]:
    """The projection as a MatMul of the dense weight, and as a grouped convolution."""
    try:
        from onnx import helper
    except ImportError:
        return {}
    node, side = helper.make_node, taps.shape[2] // 2
    weight = torch.block_diag(*pointwise)
    convolved = [
        node("Transpose", ["x"], ["channels"], perm=[0, 2, 1]),
        node("Conv", ["channels", "taps"], ["hidden"], group=len(taps), pads=[side, side]),
    ]
    offset = torch.zeros(len(weight)) if bias is None else bias
    feed, shared = {"x": x.numpy()}, {"taps": taps.numpy(), "b": offset.numpy()}
    outputs = {"y": (feed["x"].dtype, (*x.shape[:2], len(weight)))}
    matmul = [
        *convolved,
        node("Transpose", ["hidden"], ["rows"], perm=[0, 2, 1]),
        node("MatMul", ["rows", "w"], ["projected"]),
        node("Add", ["projected", "b"], ["y"]),
    ]
    convolution = [
        *convolved,
        node("Conv", ["hidden", "w", "b"], ["projected"], group=len(pointwise)),
        node("Transpose", ["projected"], ["y"], perm=[0, 2, 1]),
    ]
    dense = {"w": weight.T.contiguous().numpy()}
    kernel = {"w": pointwise.reshape(-1, pointwise.shape[2], 1).numpy()}
    calls: dict[str, Call | None] = {}
    for how, nodes, constants in (
        ("conv + matmul", matmul, dense),
        ("two convs", convolution, kernel),
    ):
        model = onnx_model(nodes, feed, outputs, shared | constants)
        calls[f"onnxruntime {how}"] = onnxruntime_call(model, feed, threads)
        calls[f"openvino {how}"] = openvino_call(model, feed, threads)
    return calls


def training(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x, depthwise, pointwise, bias = args
    leaves = (x, depthwise, pointwise) if bias is None else (x, depthwise, pointwise, bias)

    def layer(
        x: torch.Tensor, depthwise: torch.Tensor, pointwise: torch.Tensor, *bias: torch.Tensor
    ) -> torch.Tensor:
        weight = pointwise[0] if len(pointwise) == 1 else torch.block_diag(*pointwise)
        return _layer(x, depthwise.unsqueeze(1), weight, *(bias or (None,)))

    def channels_last(
        x: torch.Tensor, depthwise: torch.Tensor, pointwise: torch.Tensor, *bias: torch.Tensor
    ) -> torch.Tensor:
        return _channels_last(x, depthwise, pointwise, *(bias or (None,)))

    return {
        "fastrec": forward_backward(separable_projection, leaves),
        "torch conv1d + linear": forward_backward(layer, leaves),
        "torch channels-last conv2d": forward_backward(channels_last, leaves),
    }
