"""Rivals of ``int8_embedding``: torch on the same int8 table, and on a float table four times as
large."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rivals._common import Call, compiled, named, onnx_model, onnxruntime_call, openvino_call


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    ids, table, scale = args
    column, real = scale[:, None], table.float() * scale[:, None]

    def gather(ids: torch.Tensor, table: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, table) * F.embedding(ids, column)

    calls = {
        "torch int8 rows x scale": lambda: gather(ids, table, column),
        "torch fp32 table": lambda: F.embedding(ids, real),
        "torch.compile int8 rows x scale": compiled(gather, ids, table, column),
    }
    return named(calls | _engines(ids, table, scale, threads))


def _engines(
    ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, threads: int
) -> dict[str, Call | None]:
    """Rows and their scales gathered, converted and multiplied in one graph."""
    try:
        from onnx import helper
    except ImportError:
        return {}
    node = helper.make_node
    constants = {"table": table.numpy(), "scale": scale[:, None].numpy()}
    nodes = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("Cast", ["rows"], ["real"], to=1),
        node("Gather", ["scale", "ids"], ["factors"]),
        node("Mul", ["real", "factors"], ["y"]),
    ]
    feed = {"ids": ids.numpy()}
    outputs = {"y": (np.float32, (*ids.shape, table.shape[1]))}
    model = onnx_model(nodes, feed, outputs, constants)
    return {
        "onnxruntime int8 rows x scale": onnxruntime_call(model, feed, threads),
        "openvino int8 rows x scale": openvino_call(model, feed, threads),
    }
