"""The definition of ``int8_embedding_sum`` in pure torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastrec.errors import ArgumentError, IdRangeError
from fastrec.kernels.sparse_int8_linear.reference import quantise


def int8_embedding_sum_reference(
    ids: Sequence[torch.Tensor | None],
    tables: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor | None],
    *,
    periods: Sequence[int | None] | None = None,
    padding_ids: Sequence[int | None] | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> torch.Tensor:
    """Same arguments and result as :func:`fastrec.kernels.int8_embedding_sum`, bit for bit.

    Differentiable by float tables, as the public function is through it.
    """
    shape = next(i.shape for i in ids if i is not None)
    count, dims = shape.numel(), tables[0].shape[1]
    padding = [None] * len(tables) if padding_ids is None else padding_ids
    if not torch.compiler.is_compiling():
        for t, (rows, table) in enumerate(zip(ids, tables, strict=True)):
            outside = None if rows is None else ((rows < 0) | (rows >= len(table))).reshape(-1)
            if outside is not None and bool(outside.any()):
                assert rows is not None
                raise bad_id(t, int(outside.nonzero()[0]), len(table), rows)
    total = torch.zeros(count, dims, device=tables[0].device)
    for t, table in enumerate(tables):
        rows = ids[t]
        if rows is None:
            period = (None if periods is None else periods[t]) or max(1, shape[-1])
            rows = torch.arange(count, device=table.device) % period
        rows = rows.reshape(-1)
        entries, scale = table[rows].float(), scales[t]
        if scale is not None:
            entries = entries * scale[rows, None]
        if padding[t] is not None:
            entries = entries.masked_fill((rows == padding[t])[:, None], 0.0)
        total = total + entries
    total = total.reshape(*shape, dims)
    if out_scale is None:
        return total
    if bool(total.isnan().any()):
        raise not_a_number()
    return quantise(total, out_scale, out_zero_point)


def bad_id(table: int, position: int, count: int, ids: torch.Tensor) -> IdRangeError:
    """The error of every backend: which table, where in its ids."""
    return IdRangeError(
        f"ids[{table}]",
        f"ids in [0, {count})",
        f"{int(ids.reshape(-1)[position])} at position {position}",
    )


def not_a_number() -> ArgumentError:
    """The error of every backend where a uint8 would have to be made of a NaN."""
    return ArgumentError("tables", "numbers", "a NaN in the sum")
