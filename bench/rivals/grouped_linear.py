"""Rivals of ``grouped_linear``: the dense layer it replaces, and every way torch has to say it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastrec.kernels import grouped_linear
from rivals._common import (
    Call,
    compiled,
    forward_backward,
    named,
    onnx_model,
    onnxruntime_call,
    openvino_call,
)


def _einsum(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    by_group = x.view(len(x), len(weight), -1)
    y = torch.einsum("mgi,goi->mgo", by_group, weight).reshape(len(x), -1)
    return y if bias is None else y + bias


def _bmm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As a user would write it: groups first, and back."""
    by_group = x.view(len(x), len(weight), -1).transpose(0, 1)
    y = torch.bmm(by_group, weight.transpose(1, 2)).transpose(0, 1).reshape(len(x), -1)
    return y if bias is None else y + bias


def _conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    kernel = weight.reshape(-1, weight.shape[2], 1)
    return F.conv1d(x.unsqueeze(2), kernel, bias, groups=len(weight)).squeeze(2)


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    x, weight, bias = args
    groups, outputs, inputs = weight.shape
    dense = torch.block_diag(*weight)
    # The layout bmm likes best, which a model whose tensors are [..., d] does not have: groups
    # first, contiguous, before and after.
    by_group = x.view(-1, groups, inputs).transpose(0, 1).contiguous()
    by_input = weight.transpose(1, 2).contiguous()
    offset = torch.zeros(groups, 1, outputs, dtype=x.dtype)
    if bias is not None:
        offset = bias.view(groups, 1, outputs)
    calls = {
        "torch dense linear": lambda: F.linear(x, dense, bias),
        "torch bmm": lambda: _bmm(x, weight, bias),
        "torch bmm, groups first": lambda: torch.baddbmm(offset, by_group, by_input),
        "torch conv1d groups": lambda: _conv(x, weight, bias),
        "torch.compile einsum": compiled(_einsum, x, weight, bias),
    }
    if x.dtype is not torch.float32:
        return {f"{name} bf16": call for name, call in calls.items()}
    return calls | _engines(x, weight, bias, threads)


def _engines(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threads: int
) -> dict[str, Call]:
    """One MatMul over groups, between the transposes that rows of channels need."""
    try:
        from onnx import helper
    except ImportError:
        return {}
    groups, outputs, inputs = weight.shape
    node = helper.make_node
    constants = {
        "split": torch.tensor([len(x), groups, inputs]).numpy(),
        "merge": torch.tensor([len(x), groups * outputs]).numpy(),
        "w": weight.transpose(1, 2).contiguous().numpy(),
        "b": (torch.zeros(groups * outputs) if bias is None else bias).numpy(),
    }
    nodes = [
        node("Reshape", ["x", "split"], ["rows"]),
        node("Transpose", ["rows"], ["by_group"], perm=[1, 0, 2]),
        node("MatMul", ["by_group", "w"], ["projected"]),
        node("Transpose", ["projected"], ["back"], perm=[1, 0, 2]),
        node("Reshape", ["back", "merge"], ["merged"]),
        node("Add", ["merged", "b"], ["y"]),
    ]
    feed = {"x": x.numpy()}
    model = onnx_model(nodes, feed, {"y": (feed["x"].dtype, (len(x), groups * outputs))}, constants)
    return named(
        onnxruntime=onnxruntime_call(model, feed, threads),
        openvino=openvino_call(model, feed, threads),
    )


def training(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    """Forward and backward, against the same three ways."""
    x, weight, bias = args
    leaves = (x, weight) if bias is None else (x, weight, bias)

    def dense(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return F.linear(x, torch.block_diag(*weight), *bias)

    def bmm(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return _bmm(x, weight, *(bias or (None,)))

    return {
        "fastrec": forward_backward(grouped_linear, leaves),
        "torch dense linear": forward_backward(dense, leaves),
        "torch bmm": forward_backward(bmm, leaves),
    }


def value(output: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | tuple[Any, ...]:
    """Groups-first results as rows of channels."""
    if isinstance(output, tuple):
        return output
    output = torch.as_tensor(output)
    return output.transpose(0, 1).flatten(1) if output.dim() == 3 else output
