"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.layer_norm_quantize.reference import layer_norm_quantize_reference


def sample(
    rows: int,
    dims: int,
    *,
    affine: bool = True,
    residual: bool = False,
    quantised: bool = True,
    return_sum: bool = False,
    bench: bool = False,
) -> Sample:
    """One case; rows have means of their own, and some outputs clip.

    Args:
        rows, dims: x is [rows, dims].
        affine: whether there are a weight and a bias.
        residual: whether there is a residual.
        quantised: whether y is uint8.
        return_sum: as in the op.
        bench: whether the bench times it.
    """
    flags = {"affine": affine, "residual": residual, "u8": quantised, "sum": return_sum}
    name = "-".join([f"M{rows}-D{dims}", *(flag for flag, on in flags.items() if on)])

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(rows * 1009 + dims)
        x = torch.randn(rows, dims, generator=generator) * 3 + torch.arange(float(rows))[:, None]
        args: tuple[Any, ...] = (x,)
        if affine:
            args += tuple(torch.randn(2, dims, generator=generator).unbind(0))
        kwargs: dict[str, Any] = {}
        if residual:
            kwargs["residual"] = torch.randn(rows, dims, generator=generator)
        if quantised:
            kwargs |= {"out_scale": 0.02, "out_zero_point": 121}
        if return_sum:
            kwargs["return_sum"] = True
        return args, kwargs

    size = rows * dims
    return Sample(
        name=name,
        make=make,
        macs=3 * size,
        bytes_moved=size * (4 + 4 * residual + (1 if quantised else 4) + 4 * return_sum)
        + 8 * dims * affine,
        bench=bench,
        labels={"rows": rows, "dims": dims, "residual": residual, "uint8": quantised},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of D (lanes of 16, steps of 64), every combination of what may be left out, no
    rows, several threads, and the ranker's rows of one request and of 64."""
    cases = [sample(3, dims) for dims in (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 1000)]
    cases += [
        sample(5, 100, affine=affine, residual=residual, quantised=quantised, return_sum=total)
        for affine in (True, False)
        for residual in (True, False)
        for quantised in (True, False)
        for total in (True, False)
    ]
    cases += [sample(0, 8), sample(1, 128, quantised=False), sample(2500, 64, residual=True)]
    cases += [sample(100, 128, quantised=quantised, bench=True) for quantised in (True, False)]
    cases += [sample(6400, 128, residual=True, bench=True), sample(50, 1024, bench=True)]
    return cases


def compare(actual: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bit-exact: the reference adds in the kernels' order, and every step is one rounding."""
    expected: Any = layer_norm_quantize_reference(*args, **kwargs)
    if not isinstance(expected, tuple):
        actual, expected = (actual,), (expected,)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype, (got.dtype, want.dtype)
        assert got.shape == want.shape, (got.shape, want.shape)
        assert torch.equal(got, want), "not bit-exact"
