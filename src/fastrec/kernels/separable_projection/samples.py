"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.grouped_linear.samples import within
from fastrec.kernels.separable_projection.reference import separable_projection_reference


def sample(
    batch: int,
    length: int,
    groups: int,
    outputs: int,
    inputs: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] | None = None,
    causal: bool = False,
    bias: bool = True,
    strided: bool = False,
    bench: bool = False,
) -> Sample:
    """One case; NaNs fill the rows beyond the lengths.

    Args:
        batch, length: B and L.
        groups, outputs, inputs: G, and O and I of a group.
        width: taps.
        dtype: of all tensors.
        lengths, causal: as in the op.
        bias: whether there is one.
        strided: rows are wider than the channels.
        bench: whether the bench times it.
    """
    parts = [f"B{batch}-L{length}-G{groups}-O{outputs}-I{inputs}-W{width}"]
    parts += [str(dtype).removeprefix("torch.")]
    flags = {"lengths": lengths is not None, "causal": causal, "nobias": not bias}
    parts += [name for name, given in (flags | {"strided": strided}).items() if given]
    name = "-".join(parts)
    channels = groups * inputs

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        x = torch.full((batch, length, channels + 5 * strided), torch.nan)
        x[..., :channels] = torch.randn(batch, length, channels, generator=generator)
        kwargs: dict[str, Any] = {"causal": causal}
        if lengths is not None:
            kwargs["lengths"] = torch.tensor(lengths, dtype=torch.int64)
            for b, valid in enumerate(lengths):
                x[b, valid:] = torch.nan
        depthwise = torch.randn(channels, width, generator=generator) * width**-0.5
        pointwise = torch.randn(groups, outputs, inputs, generator=generator) * inputs**-0.5
        offset = torch.randn(groups * outputs, generator=generator).to(dtype) if bias else None
        x = x.to(dtype)[..., :channels]
        return (x, depthwise.to(dtype), pointwise.to(dtype), offset), kwargs

    used = batch * length if lengths is None else sum(lengths)
    size = dtype.itemsize
    weights = channels * (width + outputs)
    return Sample(
        name=name,
        make=make,
        macs=used * channels * (width + outputs),
        bytes_moved=size * (used * (channels + groups * outputs) + weights),
        bench=bench,
        labels={
            "batch": batch,
            "length": length,
            "groups": groups,
            "outputs": outputs,
            "inputs": inputs,
            "width": width,
        },
    )


def samples() -> Sequence[Sample]:
    """Lane edges of channels and outputs, blocks of rows (12, 96), widths beyond the sequence,
    lengths, causal ones, strided rows, and the bench shapes."""
    cases = [sample(2, rows, 1, 5, 6, 3) for rows in (1, 2, 11, 12, 13, 24, 95, 96, 97, 193)]
    cases += [sample(1, 20, 2, 7, inputs, 5) for inputs in (1, 15, 16, 17, 33, 64, 65)]
    cases += [sample(1, 14, 2, outputs, 9, 5) for outputs in (15, 16, 17, 31, 32, 33, 65)]
    cases += [sample(2, 19, 1, 8, 20, width) for width in (1, 7, 11, 13, 25, 31)]
    cases += [sample(0, 5, 1, 4, 4, 3), sample(2, 0, 1, 4, 4, 3)]
    for dtype in (torch.float32, torch.bfloat16):
        cases += [sample(4, 30, 2, 9, 10, 5, dtype=dtype, lengths=(0, 1, 17, 30))]
        cases += [sample(3, 30, 1, 16, 32, 4, dtype=dtype, lengths=(2, 30, 29), causal=True)]
        cases += [sample(2, 101, 2, 32, 16, 9, dtype=dtype, bias=False, strided=True)]
        cases += [sample(64, 100, 4, 64, 64, 5, dtype=dtype, bench=True)]
    return [*cases, sample(64, 100, 1, 128, 128, 5, bench=True)]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Against float64; see ``grouped_linear``'s tolerance, whose sums are nested here.

    A kernel on bfloat16 may round what the convolution gives, as two layers would: by 2^-9 of each
    value, and so each output by at most 2^-9 of the sum of the absolute values of its terms.
    """
    x = args[0]
    wide = tuple(None if t is None else t.double() for t in args)
    exact = separable_projection_reference(*wide, **kwargs)
    plain = separable_projection_reference(*args, **kwargs)
    magnitude = separable_projection_reference(
        *(None if t is None else t.abs() for t in wide), **kwargs
    )
    assert actual.dtype is x.dtype, actual.dtype
    rounded = 2**-9 * magnitude if x.dtype is torch.bfloat16 else 0.0
    within(actual, exact, plain.double() - exact, magnitude, rounded)
