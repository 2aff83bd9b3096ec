"""``int8_embedding_sum``: rows of several tables, scaled and added, in one pass.

    out[n] = sum over tables t of scale_t[id_t[n]] * table_t[id_t[n]], as float32 or uint8

A token of a sequential recommender is item + category + behaviour + position: gathered and added in
registers, each row is read once and nothing in between is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastrec.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._checks import check_output_quantisation
from fastrec.kernels._compiled import Signature, cpu_can_run
from fastrec.kernels._registry import Backends, OpSpec, always
from fastrec.kernels.int8_embedding_sum.reference import (
    bad_id,
    int8_embedding_sum_reference,
    not_a_number,
)
from fastrec.kernels.int8_embedding_sum.samples import compare, samples

__all__ = ["SPEC", "int8_embedding_sum"]

BACKENDS = Backends("int8_embedding_sum", {"cpu": cpu_can_run, "reference": always})

MAX_TABLES = 8
# The order of the enum in int8_embedding_sum.h.
TYPE_CODES = {torch.int8: 0, torch.float32: 1, torch.bfloat16: 2}
BAD_ID, NOT_A_NUMBER = 1, 2

Ids = Sequence[torch.Tensor | None]
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _ids_shape(ids: Ids, device: torch.device) -> torch.Size:
    """The one shape of all ids that are given."""
    shape: torch.Size | None = None
    for t, rows in enumerate(ids):
        if rows is None:
            continue
        if rows.dtype is not torch.int64:
            raise DtypeError(f"ids[{t}]", "int64", rows.dtype)
        if shape is not None and rows.shape != shape:
            raise ShapeError(f"ids[{t}]", f"shape {list(shape)}", list(rows.shape))
        if rows.device != device:
            raise DeviceError(f"ids[{t}]", f"the tables' device {device}", rows.device)
        shape = rows.shape
    if shape is None:
        raise ArgumentError("ids", "at least one tensor", "None for every table")
    return shape


def _check(
    ids: Ids,
    tables: Sequence[torch.Tensor],
    scales: Ids,
    periods: Sequence[int | None] | None,
    padding_ids: Sequence[int | None] | None,
) -> tuple[torch.Size, list[int], list[int]]:
    """Shape of the ids, the period (0: by ids) and the padding id (-1: none) of each table."""
    number = len(tables)
    if not 1 <= number <= MAX_TABLES:
        raise ArgumentError("tables", f"1 to {MAX_TABLES} tables", number)
    lists = {"ids": ids, "scales": scales, "periods": periods, "padding_ids": padding_ids}
    for name, values in lists.items():
        if values is not None and len(values) != number:
            raise ArgumentError(name, f"{number} entries, one a table", len(values))
    device = tables[0].device
    shape = _ids_shape(ids, device)
    period_of, padding_of = [0] * number, [-1] * number
    for t, (table, scale) in enumerate(zip(tables, scales, strict=True)):
        if table.dtype not in TYPE_CODES:
            raise DtypeError(f"tables[{t}]", "int8, float32 or bfloat16", table.dtype)
        size = table.shape
        if len(size) != 2 or 0 in size or size[1] != tables[0].shape[1]:
            dims = tables[0].shape[-1] if tables[0].dim() else "D"
            raise ShapeError(f"tables[{t}]", f"shape [rows, {dims}], both > 0", list(size))
        if table.device != device:
            raise DeviceError(f"tables[{t}]", f"the first table's device {device}", table.device)
        if (scale is None) != (table.dtype is not torch.int8):
            kind = "a tensor" if scale is not None else None
            raise ArgumentError(f"scales[{t}]", "a tensor exactly where the table is int8", kind)
        if scale is not None:
            if scale.dtype is not torch.float32:
                raise DtypeError(f"scales[{t}]", "float32", scale.dtype)
            if scale.shape != size[:1]:
                raise ShapeError(f"scales[{t}]", f"shape [{size[0]}]", list(scale.shape))
            if scale.device != device:
                raise DeviceError(f"scales[{t}]", f"the tables' device {device}", scale.device)
        if ids[t] is None:
            period = None if periods is None else periods[t]
            if period is None:
                if not shape:
                    raise ArgumentError(f"periods[{t}]", "a number, as ids have no length", None)
                period = max(1, shape[-1])
            if not 1 <= period <= size[0]:
                raise ArgumentError(f"periods[{t}]", f"1..{size[0]}, the table's rows", period)
            period_of[t] = period
        if padding_ids is not None and (padding := padding_ids[t]) is not None:
            if ids[t] is None or not 0 <= padding < size[0]:
                raise ArgumentError(f"padding_ids[{t}]", f"0..{size[0] - 1} with ids", padding)
            padding_of[t] = padding
    return shape, period_of, padding_of


def int8_embedding_sum(
    ids: Ids,
    tables: Sequence[torch.Tensor],
    scales: Ids,
    *,
    periods: Sequence[int | None] | None = None,
    padding_ids: Sequence[int | None] | None = None,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Looks up one row in each of up to eight tables and adds them, in the order of the tables.

    Args:
        ids: for each table int64 [...], each in [0, rows of the table), all of one shape; None for
            a position table, whose row is the position (in row-major order) modulo its period.
        tables: int8, float32 or bfloat16 [rows, D].
        scales: float32 [rows], the value of one step of each row, for an int8 table, else None.
        periods: of position tables; None is the ids' last dimension.
        padding_ids: for each table the id that adds nothing, or None.
        out_scale: None for float32; else uint8, clip(round(sum / scale) + zero point).
        out_zero_point: 0..255, of a uint8 output.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        [..., D]; the same bits on every CPU and with any number of threads. Differentiable by float
        tables (through the reference, whose values are the same).

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: a bad argument; a NaN that would have to
            become a uint8.
        IdRangeError: an id outside its table; names table and position; nothing is written.
        BackendError: the backend asked for can't run.
    """
    if out_scale is not None:
        check_output_quantisation(out_scale, out_zero_point)
    if padding_ids is periods is backend is None and not torch.compiler.is_compiling():
        plain = _plain_rows(ids, tables, scales)
        if plain is not None and BACKENDS.cpu_is_compiled:
            return _call(*plain, ids, tables, out_scale, out_zero_point)
    shape, period_of, padding_of = _check(ids, tables, scales, periods, padding_ids)
    first = tables[0]
    learning = backend is None and (
        torch.is_grad_enabled()
        and out_scale is None
        and any(t.requires_grad for t in (*tables, *scales) if t is not None)
    )
    if not learning:
        if backend is None and (torch.compiler.is_compiling() or _traced(ids, tables)):
            return torch.ops.fastrec.int8_embedding_sum(
                list(ids),
                list(tables),
                list(scales),
                period_of,
                padding_of,
                out_scale,
                out_zero_point,
            )
        decided = backend is None and first.is_cpu and BACKENDS.cpu_is_compiled
        if decided or BACKENDS.choose(Signature(first.device.type), backend) == "cpu":
            return _run(
                ids, tables, scales, shape, period_of, padding_of, out_scale, out_zero_point
            )
    return int8_embedding_sum_reference(
        ids,
        tables,
        scales,
        periods=periods,
        padding_ids=padding_ids,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
    )


def _traced(ids: Ids, tables: Sequence[torch.Tensor]) -> bool:
    return any(t is not None and type(t) not in _PLAIN for t in (*ids, *tables))


def _run(
    ids: Ids,
    tables: Sequence[torch.Tensor],
    scales: Ids,
    shape: torch.Size,
    periods: Sequence[int],
    padding_ids: Sequence[int],
    out_scale: float | None,
    out_zero_point: int,
) -> torch.Tensor:
    """The compiled kernel on checked arguments."""
    # Keeps copies alive until the call is over.
    ids = [None if i is None else i.contiguous() for i in ids]
    tables = [table.contiguous() for table in tables]
    scales = [None if s is None else s.contiguous() for s in scales]
    rows = [
        (
            table.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if row_ids is None else row_ids.data_ptr(),
            TYPE_CODES[table.dtype],
            table.shape[0],
            period,
            padding,
        )
        for table, scale, row_ids, period, padding in zip(
            tables, scales, ids, periods, padding_ids, strict=True
        )
    ]
    return _call(rows, shape, ids, tables, out_scale, out_zero_point)


# What the compiled kernel takes of a table: see int8_embedding_sum/bind.cpp.
Row = tuple[int, int, int, int, int, int, int]


def _plain_rows(
    ids: Ids, tables: Sequence[torch.Tensor], scales: Ids
) -> tuple[list[Row], torch.Size] | None:
    """The rows of a call as it mostly is, checked and gathered in one go; None for any other.

    100 lookups take the kernel 5 us; a call takes 14 this way and 20 through the full checks.
    """
    learning = torch.is_grad_enabled()
    if not len(ids) == len(tables) == len(scales) <= MAX_TABLES:
        return None
    shape: torch.Size | None = None
    dims = None
    rows: list[Row] = []
    for row_ids, table, scale in zip(ids, tables, scales, strict=True):
        size, code = table.shape, TYPE_CODES.get(table.dtype)
        if (
            type(table) not in _PLAIN
            or code is None
            or len(size) != 2
            or size[1] != (dims or size[1])
            or not table.is_cpu
            or not table.is_contiguous()
            or (learning and table.requires_grad)
            or (scale is None) != (code > 0)
        ):
            return None
        count, dims = size
        ids_at = scales_at = period = 0
        if scale is not None:
            if (
                type(scale) not in _PLAIN
                or scale.dtype is not torch.float32
                or scale.shape != (count,)
                or not scale.is_cpu
                or not scale.is_contiguous()
                or (learning and scale.requires_grad)
            ):
                return None
            scales_at = scale.data_ptr()
        if row_ids is None:
            if not shape or not 1 <= shape[-1] <= count:
                return None
            period = shape[-1]
        else:
            if (
                type(row_ids) is not torch.Tensor
                or row_ids.dtype is not torch.int64
                or (shape is not None and row_ids.shape != shape)
                or not row_ids.is_cpu
                or not row_ids.is_contiguous()
            ):
                return None
            shape = row_ids.shape
            ids_at = row_ids.data_ptr()
        rows.append((table.data_ptr(), scales_at, ids_at, code, count, period, -1))
    return None if shape is None or not dims or 0 in shape else (rows, shape)


def _call(
    rows: list[Row],
    shape: torch.Size,
    ids: Ids,
    tables: Sequence[torch.Tensor],
    out_scale: float | None,
    out_zero_point: int,
) -> torch.Tensor:
    dims = tables[0].shape[1]
    quantised = out_scale is not None
    # Sizes one by one: torch takes half a microsecond longer over a tuple of them.
    dtype = torch.uint8 if quantised else torch.float32
    out = torch.empty(*shape, dims, dtype=dtype)
    if not out.is_cpu:  # the caller's default device; naming ours always costs as much
        out = torch.empty(*shape, dims, dtype=dtype, device="cpu")
    status, bad, position = _compiled.native().int8_embedding_sum.run(
        rows,
        out.data_ptr(),
        quantised,
        out_scale if quantised else 1.0,
        out_zero_point,
        shape.numel(),
        dims,
    )
    if status == BAD_ID:
        row_ids = ids[bad]
        assert row_ids is not None
        raise bad_id(bad, position, tables[bad].shape[0], row_ids)
    if status == NOT_A_NUMBER:
        raise not_a_number()
    return out


_LIBRARY = torch.library.Library("fastrec", "FRAGMENT")
# Periods are 0 where a table goes by ids, padding ids -1 where there is none.
_LIBRARY.define(
    "int8_embedding_sum(Tensor?[] ids, Tensor[] tables, Tensor?[] scales, int[] periods, "
    "int[] padding_ids, float? out_scale=None, int out_zero_point=0) -> Tensor"
)


def _op(
    ids: list[torch.Tensor | None],
    tables: list[torch.Tensor],
    scales: list[torch.Tensor | None],
    periods: list[int],
    padding_ids: list[int],
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> torch.Tensor:
    with torch.no_grad():
        return int8_embedding_sum(
            ids,
            tables,
            scales,
            periods=[period or None for period in periods],
            padding_ids=[None if padding < 0 else padding for padding in padding_ids],
            out_scale=out_scale,
            out_zero_point=out_zero_point,
            backend=BACKENDS.choose(Signature("cpu")),
        )


def _fake(
    ids: list[torch.Tensor | None],
    tables: list[torch.Tensor],
    scales: list[torch.Tensor | None],
    periods: list[int],
    padding_ids: list[int],
    out_scale: float | None = None,
    out_zero_point: int = 0,
) -> torch.Tensor:
    shape = next(i.shape for i in ids if i is not None)
    dtype = torch.float32 if out_scale is None else torch.uint8
    return tables[0].new_empty((*shape, tables[0].shape[1]), dtype=dtype)


_LIBRARY.impl("int8_embedding_sum", _op, "CPU")
torch.library.register_fake("fastrec::int8_embedding_sum", _fake, lib=_LIBRARY)

SPEC = OpSpec(
    op_id="int8_embedding_sum",
    summary="rows of several int8 or float tables, scaled and added, in one pass",
    function=int8_embedding_sum,
    reference=int8_embedding_sum_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)
