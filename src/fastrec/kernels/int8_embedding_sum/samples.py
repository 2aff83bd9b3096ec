"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.int8_embedding_sum.reference import int8_embedding_sum_reference

TYPES = {"i": torch.int8, "f": torch.float32, "b": torch.bfloat16}


def sample(
    shape: tuple[int, ...],
    kinds: str,
    dims: int,
    counts: Sequence[int],
    *,
    position: bool = False,
    padding: bool = False,
    quantised: bool = False,
    bench: bool = False,
) -> Sample:
    """``kinds``: one of "i", "f", "b" a table; ``position``: the last one goes by position."""
    flags = {"position": position, "padding": padding, "u8": quantised}
    size = "x".join(map(str, shape)) or "scalar"
    name = "-".join([f"n{size}-{kinds}-D{dims}", *(flag for flag, on in flags.items() if on)])

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(dims * 31 + len(kinds))
        ids: list[torch.Tensor | None] = []
        tables, scales = [], []
        for kind, count in zip(kinds, counts, strict=True):
            ids.append(torch.randint(0, count, shape, generator=generator))
            if kind == "i":
                entries = torch.randint(-127, 128, (count, dims), generator=generator)
                scales.append(torch.rand(count, generator=generator) * 0.02)
            else:
                entries = torch.randn(count, dims, generator=generator)
                scales.append(None)
            tables.append(entries.to(TYPES[kind]))
        if position:
            ids[-1] = None
        kwargs: dict[str, Any] = {}
        if padding:
            kwargs["padding_ids"] = [0 if i is not None else None for i in ids]
        if quantised:
            kwargs |= {"out_scale": 0.03, "out_zero_point": 117}
        return (ids, tables, scales), kwargs

    count = torch.Size(shape).numel()
    row_bytes = sum(dims * TYPES[kind].itemsize + 8 for kind in kinds)
    return Sample(
        name=name,
        make=make,
        macs=count * dims * len(kinds),
        bytes_moved=count * (row_bytes + dims * (1 if quantised else 4)),
        bench=bench,
        labels={"lookups": count, "tables": kinds, "dims": dims},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of D (lanes of 16, blocks of 64), each type, one to eight tables, padding, no
    rows, several threads, and the ranker's history of one request and of 64."""
    cases = [sample((2, 5), "ifb", dims, (9, 7, 5)) for dims in (1, 15, 16, 17, 63, 64, 65, 130)]
    cases += [
        sample((3, 4), "ibf", 70, (9, 3, 4), position=position, padding=padding, quantised=u8)
        for position in (True, False)
        for padding in (True, False)
        for u8 in (True, False)
    ]
    cases += [sample((6,), kind, 20, (8,)) for kind in ("i", "f", "b")]
    cases += [sample((5,), "iiffbbii", 33, (4, 5, 6, 7, 8, 9, 10, 1), padding=True)]
    cases += [sample((0, 3), "if", 8, (5, 3), position=True), sample((), "if", 8, (5, 3))]
    cases += [sample((30, 100), "iif", 96, (500, 40, 100), position=True)]
    ranker = (200_000, 10_000, 5, 100)
    return [
        *cases,
        sample((1, 100), "iiff", 128, ranker, position=True, bench=True),
        sample((64, 100), "iiff", 128, ranker, position=True, bench=True),
        sample((1, 100), "iiff", 128, ranker, position=True, quantised=True, bench=True),
    ]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bit-exact: a product and an addition an entry, in the order of the tables."""
    expected = int8_embedding_sum_reference(*args, **kwargs)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.equal(actual, expected), "not bit-exact"
