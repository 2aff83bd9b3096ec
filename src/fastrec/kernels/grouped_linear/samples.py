"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.grouped_linear.reference import grouped_linear_reference


def sample(
    rows: int,
    groups: int,
    outputs: int,
    inputs: int,
    *,
    dtype: torch.dtype = torch.float32,
    shuffle: bool = False,
    bias: bool = True,
    strided: bool = False,
    bench: bool = False,
) -> Sample:
    """One case.

    Args:
        rows, groups, outputs, inputs: M, G, and O and I of a group.
        dtype: of all tensors.
        shuffle: as in the op.
        bias: whether there is one.
        strided: x is the first channels of wider rows, filled up with NaN.
        bench: whether the bench times it.
    """
    parts = [f"M{rows}-G{groups}-O{outputs}-I{inputs}", str(dtype).removeprefix("torch.")]
    parts += [
        name
        for name, given in (("shuffle", shuffle), ("nobias", not bias), ("strided", strided))
        if given
    ]
    name = "-".join(parts)

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        width = groups * inputs
        x = torch.full((rows, width + 7 * strided), torch.nan)
        x[:, :width] = torch.randn(rows, width, generator=generator)
        weight = torch.randn(groups, outputs, inputs, generator=generator) * inputs**-0.5
        offset = torch.randn(groups * outputs, generator=generator).to(dtype) if bias else None
        return (x.to(dtype)[:, :width], weight.to(dtype), offset), {"shuffle": shuffle}

    size = dtype.itemsize
    return Sample(
        name=name,
        make=make,
        macs=rows * groups * outputs * inputs,
        bytes_moved=size * groups * (rows * (outputs + inputs) + outputs * inputs),
        bench=bench,
        labels={"rows": rows, "groups": groups, "outputs": outputs, "inputs": inputs},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of rows (few, tiles of 12), outputs (panels of 32, lanes of 16), inputs (lines of
    16, pairs), shuffles, strided rows, and the bench shapes."""
    cases = [sample(rows, 2, 20, 9) for rows in (0, 1, 2, 3, 5, 7, 11, 12, 13, 23, 24, 25, 97)]
    cases += [sample(rows, 3, 17, 33) for rows in (1, 2, 4, 6, 8, 9)]
    for dtype in (torch.float32, torch.bfloat16):
        edges = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65)
        cases += [sample(14, 2, outputs, 8, dtype=dtype) for outputs in edges]
        cases += [sample(6, 3, 18, inputs, dtype=dtype) for inputs in edges]
        cases += [sample(2, 2, outputs, 31, dtype=dtype, strided=True) for outputs in edges]
        cases += [sample(2, 3, 18, 31, dtype=dtype, shuffle=True, strided=True)]
        cases += [sample(29, 4, 16, 24, dtype=dtype, shuffle=True)]
        cases += [sample(29, 3, 5, 7, dtype=dtype, shuffle=True, bias=False, strided=True)]
        cases += [sample(13, 1, 40, 33, dtype=dtype, strided=True)]
        cases += [sample(200, 4, 32, 32, dtype=dtype, bias=False)]
        cases += [sample(6400, 4, 64, 64, dtype=dtype, bench=True)]
    return [
        *cases,
        sample(3, 1, 33, 2100),
        sample(6400, 4, 16, 16, bench=True),
        sample(100, 4, 64, 64, bench=True),
        sample(1, 4, 64, 64, bench=True),
    ]


def within(
    actual: torch.Tensor,
    exact: torch.Tensor,
    torch_error: torch.Tensor,
    magnitude: torch.Tensor,
    rounded: torch.Tensor | float = 0.0,
) -> None:
    """Asserts |actual - exact| <= 2 x torch's largest error + a floor.

    Each addition is off by at most
    2^-24 of the partial sum. For terms of random sign partial sums grow like the root of their
    number, so the errors of n additions together are of the order of 2^-24 n^(1/2) n^(1/2) / 3 =
    a third of 2^-24 times the magnitude; 4 of it leaves 10 standard deviations. Half-precision
    results add their own rounding, half a unit in the last place; an underflow adds less than
    2^-126 a term.

    Args:
        actual: the result.
        exact: in float64.
        torch_error: of the same formula in torch, in the result's dtype.
        magnitude: sums of the absolute values of the terms.
        rounded: error that the rounding of an intermediate result may add.
    """
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if not exact.numel():
        return
    floor = 4 * 2**-24 * magnitude.double() + 2.0**-110 + rounded
    if actual.dtype is torch.bfloat16:
        floor = floor + 2**-8 * exact.abs()
    allowed = 2 * torch_error.abs().max() + floor
    assert not bool(actual.isnan().any()), "NaN in the output"
    excess = ((actual.double() - exact).abs() / allowed).max().item()
    assert excess <= 1, f"error is {excess:.3g} times what is allowed"


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Against float64; see :func:`within`."""
    x, weight, bias = args
    wide = (x.double(), weight.double(), None if bias is None else bias.double())
    exact = grouped_linear_reference(*wide, **kwargs)
    plain = grouped_linear_reference(*args, **kwargs)
    magnitude = grouped_linear_reference(*(None if t is None else t.abs() for t in wide), **kwargs)
    assert actual.dtype is x.dtype, actual.dtype
    within(actual, exact, plain.double() - exact, magnitude)
