"""``int8_embedding``: gather rows of an int8 table and scale them, in one pass.

out[i, d] = scale[ids[i]] * table[ids[i], d]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrec.errors import DeviceError, DtypeError, IdRangeError, ShapeError
from fastrec.kernels import _compiled
from fastrec.kernels._compiled import Signature, cpu_can_run
from fastrec.kernels._registry import Backends, OpSpec, Sample, always
from fastrec.kernels._torch_op import define_op
from fastrec.kernels.int8_embedding.reference import int8_embedding_reference

__all__ = ["SPEC", "int8_embedding"]

BACKENDS = Backends("int8_embedding", {"cpu": cpu_can_run, "reference": always})


def check_table(table: torch.Tensor, scale: torch.Tensor) -> None:
    """Raises unless table is int8 [rows, D] and scale float32 [rows], on one device."""
    if table.dtype is not torch.int8:
        raise DtypeError("table", "int8", table.dtype)
    shape = table.shape
    if len(shape) != 2 or 0 in shape:
        raise ShapeError("table", "shape [rows, D], both > 0", list(shape))
    if scale.dtype is not torch.float32:
        raise DtypeError("scale", "float32", scale.dtype)
    if scale.dim() != 1 or scale.shape[0] != shape[0]:
        raise ShapeError("scale", f"shape [{shape[0]}]", list(scale.shape))
    if not (scale.is_cpu and table.is_cpu) and scale.device != table.device:
        raise DeviceError("scale", f"the table's device {table.device}", scale.device)


def gather(ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The compiled kernel on arguments that :func:`check_table` has passed, all contiguous.

    Raises:
        IdRangeError: an id lies outside the table.
    """
    rows, dims = table.shape
    # Sizes one by one: torch takes a microsecond more for a tuple.
    out = scale.new_empty(*ids.shape, dims)
    bad = _compiled.native().int8_embedding.run(
        ids.data_ptr(),
        table.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        ids.numel(),
        rows,
        dims,
    )
    if bad >= 0:
        raise IdRangeError("ids", f"ids in [0, {rows})", int(ids.reshape(-1)[bad]))
    return out


def int8_embedding(
    ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Looks up rows of an int8 table.

    Args:
        ids: int64 [...], each in [0, rows).
        table: int8 [rows, D].
        scale: float32 [rows], the value of one step of each row.
        backend: None picks the best once per signature; "cpu" or "reference" forces one.

    Returns:
        float32 [..., D]; exact (one rounding). Not differentiable.

    Raises:
        ShapeError, DtypeError, DeviceError: a bad argument.
        IdRangeError: an id lies outside the table; nothing outside is read.
        BackendError: the backend asked for can't run.
    """
    check_table(table, scale)
    if ids.dtype is not torch.int64:
        raise DtypeError("ids", "int64", ids.dtype)
    if not (ids.is_cpu and table.is_cpu) and ids.device != table.device:
        raise DeviceError("ids", f"the table's device {table.device}", ids.device)
    decided = backend is None and ids.is_cpu and BACKENDS.cpu_is_compiled
    if not decided and BACKENDS.choose(Signature(ids.device.type), backend) == "reference":
        return int8_embedding_reference(ids, table, scale)
    return gather(ids.contiguous(), table.contiguous(), scale.contiguous())


def _fake(ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale.new_empty((*ids.shape, table.shape[1]))


define_op(
    "int8_embedding(Tensor ids, Tensor table, Tensor scale) -> Tensor",
    int8_embedding,
    _fake,
    devices=("CPU",),
)


def sample(name: str, shape: tuple[int, ...], rows: int, dims: int, bench: bool = False) -> Sample:
    """One case: random ids, first and last row among them.

    Args:
        name: of the case.
        shape: of the ids.
        rows, dims: the table is [rows, dims].
        bench: whether the bench times it.
    """

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(rows * 1009 + dims)
        ids = torch.randint(0, rows, shape, generator=generator)
        if ids.numel():
            ids.view(-1)[0], ids.view(-1)[-1] = 0, rows - 1
        table = torch.randint(-127, 128, (rows, dims), generator=generator, dtype=torch.int8)
        return (ids, table, torch.rand(rows, generator=generator)), {}

    count = torch.Size(shape).numel()
    return Sample(
        name=f"{name}-R{rows}-D{dims}",
        make=make,
        macs=count * dims,
        bytes_moved=count * (8 + 4 + 5 * dims),
        bench=bench,
        labels={"lookups": count, "rows": rows, "dims": dims},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of D (16), empty and scalar ids, one row, and the canonical ranker's lookups."""
    cases = [sample(f"n{7}", (7,), 50, dims) for dims in (1, 15, 16, 17, 63, 64, 65)]
    cases += [sample("empty", (0, 3), 5, 8), sample("scalar", (), 5, 8), sample("one", (4,), 1, 8)]
    cases += [sample("threads", (3, 300), 1000, 32)]
    return [
        *cases,
        sample("history", (1, 100), 200_000, 128, bench=True),
        sample("batch", (64, 100), 200_000, 128, bench=True),
    ]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bit-exact: one int-to-float conversion and one product."""
    expected = int8_embedding_reference(*args, **kwargs)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert torch.equal(actual, expected), "not bit-exact"


SPEC = OpSpec(
    op_id="int8_embedding",
    summary="gather rows of an int8 table and scale them",
    function=int8_embedding,
    reference=int8_embedding_reference,
    backends=BACKENDS,
    samples=samples,
    compare=compare,
)
