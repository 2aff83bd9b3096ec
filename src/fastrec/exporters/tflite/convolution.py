"""Depthwise convolutions along a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastrec.errors import BackendError
from fastrec.exporters.tflite.conversion import Conversion, attributes


def depthwise(c: Conversion, node: Any) -> None:
    """A depthwise Conv along the last axis of [B, C, L]: [B, 1, L, C] in TFLite."""
    g, given, name = c.graph, attributes(node), node.output[0]
    taps = c.value(node.input[1])
    plain = taps.ndim == 3 and taps.shape[1] == 1 and given.get("group", 1) == len(taps)
    steps = {*given.get("strides", [1]), *given.get("dilations", [1])}
    if not plain or steps != {1} or given.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise BackendError("no TFLite form of a Conv other than depthwise, in one dimension")

    def turned(tensor: int, like: str) -> int:
        """[B, C, L] <-> [B, L, C]."""
        (b, x, y), marks = c.shapes[like], c.free[like]
        order = g.constant(np.array([0, 2, 1], np.int32))
        free = (marks[0], marks[2], marks[1])
        target = g.tensor(f"{like}.{len(g.tensors)}", (b, y, x), "float32", free=free)
        g.operator("TRANSPOSE", [tensor, order], [target], g.options("Transpose"))
        return target

    rows = turned(c.read(node.input[0]), node.input[0])
    if any(pads := given.get("pads", [])):
        (b, length, channels), free = g.tensors[rows].shape, g.tensors[rows].free
        shape = (b, length + sum(pads), channels)
        padded = g.tensor(f"{name}.padded", shape, "float32", free=free)
        around = g.constant(np.array([[0, 0], pads, [0, 0]], np.int32))
        g.operator("PAD", [rows, around], [padded], g.options("Pad"))
        rows = padded
    image = g.tensor(
        f"{name}.image",
        (g.tensors[rows].shape[0], 1, *g.tensors[rows].shape[1:]),
        "float32",
        free=(g.tensors[rows].free[0], False, *g.tensors[rows].free[1:]),
    )
    g.operator("EXPAND_DIMS", [rows, g.constant(np.int32(1))], [image], g.options("ExpandDims"))
    has_bias = len(node.input) > 2 and node.input[2]
    bias = c.value(node.input[2]) if has_bias else np.zeros(len(taps), np.float32)
    (b, channels, length), free = c.shapes[name], c.free[name]
    result = g.tensor(
        f"{name}.result", (b, 1, length, channels), "float32", free=(free[0], False, free[2], False)
    )
    options = g.options(
        "DepthwiseConv2D", padding=g.valid_padding(), strideW=1, strideH=1, depthMultiplier=1
    )
    kernel = g.constant(taps[:, 0].T[None, None])
    g.operator("DEPTHWISE_CONV_2D", [image, kernel, g.constant(bias)], [result], options)
    flat = g.tensor(
        f"{name}.flat", (b, length, channels), "float32", free=(free[0], free[2], False)
    )
    g.operator("SQUEEZE", [result], [flat], g.options("Squeeze", squeezeDims=[1]))
    order = g.constant(np.array([0, 2, 1], np.int32))
    g.operator("TRANSPOSE", [flat, order], [c.result(name)], g.options("Transpose"))
