"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.activation_quantize.reference import (
    activation_quantize_reference,
    pre_activation,
)
from fastrec.kernels.sparse_int8_linear.reference import quantise


def sample(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    activation: str | None,
    out: str | None,
    *,
    bias: bool = True,
    bench: bool = False,
) -> Sample:
    """One case; some values clip.

    Args:
        shape, dtype: of x.
        activation, out: as in the op.
        bias: whether int32 sums have one.
        bench: whether the bench times it.
    """
    kind = str(dtype).removeprefix("torch.")
    size = "x".join(map(str, shape)) or "scalar"
    name = "-".join([size, kind, activation or "none", out or "float32"] + ["nobias"] * (not bias))

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(sum(shape) + 7)
        kwargs: dict[str, Any] = {"out": out}
        if dtype is torch.int32:
            x = torch.randint(-(2**20), 2**20, shape, generator=generator, dtype=torch.int32)
            kwargs["scale"] = torch.rand(shape[-1], generator=generator) * 8e-6
            kwargs["bias"] = torch.randn(shape[-1], generator=generator) if bias else None
        else:
            x = (torch.randn(shape, generator=generator) * 4).to(dtype)
        if out == "uint8":
            kwargs |= {"out_scale": 0.04, "out_zero_point": 19}
        return (x, activation), kwargs

    count = torch.Size(shape).numel()
    out_bytes = {"uint8": 1, "bfloat16": 2, None: 4}[out]
    return Sample(
        name=name,
        make=make,
        macs=count * (12 if activation == "gelu" else 1),
        bytes_moved=count * (dtype.itemsize + out_bytes),
        bench=bench,
        labels={"count": count, "input": kind, "activation": activation, "output": out},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of sizes and channels (16), every input, activation and output, no elements, no
    dimensions, several threads, and the ranker's FFN of one request and of 64."""
    f32, bf16, s32 = torch.float32, torch.bfloat16, torch.int32
    cases = [sample((n,), f32, "gelu", "uint8") for n in (0, 1, 15, 16, 17, 63, 64, 65)]
    cases += [sample((3, n), s32, "relu", "uint8") for n in (1, 15, 16, 17, 63, 64, 65)]
    cases += [
        sample((5, 37), dtype, activation, out)
        for dtype in (f32, bf16, s32)
        for activation in (None, "relu", "gelu")
        for out in ("uint8", "bfloat16", None)
    ]
    cases += [sample((4, 20), s32, None, "uint8", bias=False), sample((), f32, "relu", "uint8")]
    cases += [sample((0, 3), s32, None, None), sample((2100, 65), s32, "relu", "uint8")]
    cases += [sample((200_003,), f32, "relu", "uint8")]
    for rows in (100, 6400):
        cases += [sample((rows, 512), t, "gelu", "uint8", bench=True) for t in (f32, s32)]
    return [*cases, sample((100, 512), bf16, "gelu", "uint8", bench=True)]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bit-exact against the reference; with GELU within the bound derived here.

    The kernels' erf is off by at most 4.3e-7 and its argument by one rounding (relative 2^-24,
    times |y| * erf'(y) <= 0.49); with the two roundings of v/2 * (1 + erf): |error| <= |v| *
    (2.15e-7 + 3 * 2^-24) < |v| * 4e-7. A uint8 or bfloat16 may be the neighbour only where that
    error crosses a tie.
    """
    expected = activation_quantize_reference(*args, **kwargs)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    x, activation = (*args, None)[:2]
    if activation != "gelu":
        assert torch.equal(actual, expected), "not bit-exact"
        return
    value = pre_activation(x, kwargs.get("scale"), kwargs.get("bias")).double()
    exact, bound = torch.nn.functional.gelu(value), value.abs() * 4e-7 + 1e-12
    out = kwargs.get("out")

    def end(value: torch.Tensor) -> torch.Tensor:
        if out == "uint8":
            return quantise(value.float(), kwargs["out_scale"], kwargs["out_zero_point"]).double()
        return value.float().bfloat16().double() if out == "bfloat16" else value

    got = actual.double()
    inside = (got >= end(exact - bound)) & (got <= end(exact + bound))
    assert bool(inside.all()), "beyond the GELU bound"
