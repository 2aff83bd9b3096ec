"""Rivals of ``activation_quantize``: torch in steps, eager and compiled, and the same graph in ONNX
Runtime and OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np
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
    x, activation = args
    act = {None: lambda v: v, "relu": torch.relu, "gelu": F.gelu}[activation]
    scale, zero_point = kwargs["out_scale"], kwargs["out_zero_point"]
    channel, bias = kwargs.get("scale"), kwargs.get("bias")

    def real(x: torch.Tensor) -> torch.Tensor:
        if channel is None:
            return act(x.float())
        # One pass, where x * channel + bias takes two.
        return act(x.float() * channel if bias is None else torch.addcmul(bias, x.float(), channel))

    model, feed = _graph(x, activation, kwargs)
    return named(
        torch_eager=lambda: quantised(real(x), scale, zero_point),
        torch_compile=compiled(lambda x: codes(real(x), scale, zero_point), x),
        onnxruntime=onnxruntime_call(model, feed, threads),
        openvino=openvino_call(model, feed, threads),
    )


def _graph(
    x: torch.Tensor, activation: str | None, kwargs: dict[str, Any]
) -> tuple[bytes | None, dict[str, Any]]:
    """None for bfloat16, which ONNX Runtime lacks on the CPU."""
    try:
        from onnx import helper
    except ImportError:
        return None, {}
    if x.dtype is torch.bfloat16:
        return None, {}
    nodes, last = [], "x"

    def then(op: str, *others: str, **attributes: Any) -> None:
        nonlocal last
        nodes.append(helper.make_node(op, [last, *others], [f"{op}_of_{last}"], **attributes))
        last = f"{op}_of_{last}"

    constants: dict[str, Any] = {
        "step": np.float32(kwargs["out_scale"]),
        "zero": np.uint8(kwargs["out_zero_point"]),
    }
    if x.dtype is torch.int32:
        constants["scale"] = kwargs["scale"].numpy()
        then("Cast", to=1)
        then("Mul", "scale")
        if kwargs["bias"] is not None:
            constants["bias"] = kwargs["bias"].numpy()
            then("Add", "bias")
    if activation is not None:
        then({"relu": "Relu", "gelu": "Gelu"}[activation])
    then("QuantizeLinear", "step", "zero")
    feed = {"x": x.numpy()}
    # Gelu is an operator since opset 20.
    return onnx_model(nodes, feed, {last: (np.uint8, tuple(x.shape))}, constants, opset=20), feed


def value(output: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """The codes."""
    output = torch.as_tensor(output)
    return output.int_repr() if output.is_quantized else output
