"""Rivals of ``int8_embedding_sum``: torch in steps and compiled, on the same tables and on float
ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from rivals._common import Call, compiled, named


def rivals(args: Any, kwargs: dict[str, Any], threads: int) -> dict[str, Call]:
    ids, tables, scales = args
    given = [i for i in ids if i is not None]
    positions = torch.arange(given[0].shape[-1]).expand(given[0].shape)
    rows = [positions if i is None else i for i in ids]
    columns = [None if s is None else s[:, None] for s in scales]
    pairs = zip(tables, columns, strict=True)
    floats = [t.float() if c is None else t.float() * c for t, c in pairs]
    scale, zero_point = kwargs.get("out_scale"), kwargs.get("out_zero_point", 0)

    def end(total: torch.Tensor) -> torch.Tensor:
        if scale is None:
            return total
        return torch.clamp(torch.round(total * (1 / scale)) + zero_point, 0, 255).to(torch.uint8)

    def on_int8(rows: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(())
        for row, table, column in zip(rows, tables, columns, strict=True):
            entries = F.embedding(row, table)
            total = total + (entries if column is None else entries * F.embedding(row, column))
        return end(total)

    def on_floats(rows: list[torch.Tensor]) -> torch.Tensor:
        total = F.embedding(rows[0], floats[0])
        for row, table in zip(rows[1:], floats[1:], strict=True):
            total = total + F.embedding(row, table)
        return end(total)

    return named(
        torch_int8_tables=lambda: on_int8(rows),
        torch_fp32_tables=lambda: on_floats(rows),
        torch_compile_int8_tables=compiled(on_int8, rows),
        torch_compile_fp32_tables=compiled(on_floats, rows),
    )
