"""Rivals of ``int8_embedding_sum``: torch in steps, compiled and in its one fused lookup, on int8
and on float tables, and the same graph in ONNX Runtime and OpenVINO."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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

End = Callable[[torch.Tensor], torch.Tensor]


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    ids, tables, scales = args
    assert ids[0] is not None, "the sum is made in the first rows"
    length = next(i for i in ids if i is not None).shape[-1]
    columns = [None if s is None else s[:, None] for s in scales]
    pairs = zip(tables, columns, strict=True)
    floats = [t.float() if c is None else t.float() * c for t, c in pairs]
    scale, zero_point = kwargs.get("out_scale"), kwargs.get("out_zero_point", 0)

    def eager_end(total: torch.Tensor) -> torch.Tensor:
        return total if scale is None else quantised(total, scale, zero_point)

    def fused_end(total: torch.Tensor) -> torch.Tensor:
        return total if scale is None else codes(total, scale, zero_point)

    def rows_of(table: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Rows by position are a slice, which the sum broadcasts."""
        return table[:length] if rows is None else F.embedding(rows, table)

    def on_int8(rows: list[torch.Tensor | None], end: End) -> torch.Tensor:
        entries = []
        for row, table, column in zip(rows, tables, columns, strict=True):
            entry = rows_of(table, row)
            entries.append(entry if column is None else entry * rows_of(column, row))
        return end(_summed(entries))

    def on_floats(rows: list[torch.Tensor | None], end: End) -> torch.Tensor:
        return end(_summed([rows_of(t, row) for t, row in zip(floats, rows, strict=True)]))

    return named(
        torch_int8_tables=lambda: on_int8(ids, eager_end),
        torch_fp32_tables=lambda: on_floats(ids, eager_end),
        torch_compile_int8_tables=compiled(on_int8, ids, fused_end),
        torch_compile_fp32_tables=compiled(on_floats, ids, fused_end),
    ) | named(
        {name: _ended(call, eager_end) for name, call in _bags(ids, tables, scales, floats).items()}
        | _engines(ids, tables, scales, kwargs, threads)
    )


def _summed(entries: list[torch.Tensor]) -> torch.Tensor:
    """In place: the first entries are this call's own."""
    total, *rest = entries
    for entry in rest:
        total += entry
    return total


def _ended(call: Call, end: End) -> Call:
    return lambda: end(call())


def _bags(
    ids: Any, tables: Any, scales: Any, floats: list[torch.Tensor]
) -> dict[str, Callable[[], torch.Tensor]]:
    """torch's fused sum of lookups (FBGEMM) on all tables as one, the ids merged beforehand: more
    than a caller whose ids come by feature has.

    The int8 one keeps a scale and an offset in each row, and the float tables are int8 there too.
    """
    shape = next(i for i in ids if i is not None).shape
    starts = itertools.accumulate((len(table) for table in tables), initial=0)
    positions = torch.arange(shape[-1]).expand(shape)
    merged = torch.stack(
        [(positions if i is None else i) + start for i, start in zip(ids, starts, strict=False)],
        -1,
    ).flatten(0, -2)
    together = torch.cat(floats)
    rows = merged.flatten()
    begins = torch.arange(0, rows.numel(), merged.shape[1])
    packed = torch.cat(
        [
            torch.ops.quantized.embedding_bag_byte_prepack(real)
            if scale is None
            else _byte_rows(table, scale)
            for table, scale, real in zip(tables, scales, floats, strict=True)
        ]
    )
    by_bytes = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
    return {
        "torch embedding_bag, one fp32 table": lambda: F.embedding_bag(
            merged, together, mode="sum"
        ).view(*shape, -1),
        "torch int8 embedding_bag (FBGEMM), one table": lambda: by_bytes(
            packed, rows, begins, False, 0, False, None, None, False
        ).view(*shape, -1),
    }


def _byte_rows(table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FBGEMM's rows: codes, then scale and offset as float32; the same numbers."""
    real = torch.stack([scale, -128 * scale], 1).view(torch.uint8)
    return torch.cat([(table.int() + 128).to(torch.uint8), real], 1)


def _engines(
    ids: Any, tables: Any, scales: Any, kwargs: dict[str, Any], threads: int
) -> dict[str, Call | None]:
    try:
        from onnx import helper
    except ImportError:
        return {}
    node = helper.make_node
    shape = next(i for i in ids if i is not None).shape
    feed, constants, nodes, entries = {}, {}, [], []
    for t, (rows, table, scale) in enumerate(zip(ids, tables, scales, strict=True)):
        if rows is None:
            real = table[: shape[-1]].float()
            constants[f"e{t}"] = (
                real if scale is None else real * scale[: len(real), None]
            ).numpy()
        else:
            feed[f"ids{t}"], constants[f"t{t}"] = rows.numpy(), table.numpy()
            gathered = f"e{t}" if scale is None else f"g{t}"
            nodes.append(node("Gather", [f"t{t}", f"ids{t}"], [gathered]))
        if rows is not None and scale is not None:
            constants[f"s{t}"] = scale[:, None].numpy()
            nodes += [
                node("Cast", [f"g{t}"], [f"r{t}"], to=1),
                node("Gather", [f"s{t}", f"ids{t}"], [f"f{t}"]),
                node("Mul", [f"r{t}", f"f{t}"], [f"e{t}"]),
            ]
        entries.append(f"e{t}")
    for t in range(1, len(entries)):
        nodes.append(node("Add", [entries[t - 1], entries[t]], [f"sum{t}"]))
        entries[t] = f"sum{t}"
    last, dtype = entries[-1], np.float32
    if kwargs.get("out_scale") is not None:
        constants["step"] = np.float32(kwargs["out_scale"])
        constants["zero"] = np.uint8(kwargs["out_zero_point"])
        nodes.append(node("QuantizeLinear", [last, "step", "zero"], ["y"]))
        last, dtype = "y", np.uint8
    outputs = {last: (dtype, (*shape, tables[0].shape[1]))}
    model = onnx_model(nodes, feed, outputs, constants)
    return {
        "onnxruntime int8 tables": onnxruntime_call(model, feed, threads),
        "openvino int8 tables": openvino_call(model, feed, threads),
    }


def value(output: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Sums or codes."""
    output = torch.as_tensor(output)
    return output.int_repr() if output.is_quantized else output
