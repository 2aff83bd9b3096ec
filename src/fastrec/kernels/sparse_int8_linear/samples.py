"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._gpu import ceil_div
from fastrec.kernels._registry import Sample
from fastrec.kernels.sparse_int8_linear.packed import (
    GROUP_INPUTS,
    PANEL_OUTPUTS,
    PackedWeight,
)
from fastrec.kernels.sparse_int8_linear.reference import quantise, sparse_int8_linear_reference


def random_weight(
    outputs: int,
    inputs: int,
    density: float,
    generator: torch.Generator,
    *,
    two_four: bool = False,
) -> PackedWeight:
    """A random s8 weight [outputs, inputs].

    Args:
        outputs, inputs: N and K.
        density: round(density * groups) groups are kept in each panel.
        generator: draws the weight.
        two_four: each output keeps 2 of the 4 inputs of a group at most.
    """
    panels, groups = ceil_div(outputs, PANEL_OUTPUTS), ceil_div(inputs, GROUP_INPUTS)
    kept = torch.rand(panels, groups, generator=generator).argsort(1) < round(density * groups)
    mask = kept.repeat_interleave(PANEL_OUTPUTS, 0).repeat_interleave(GROUP_INPUTS, 1)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    # No accidental zeros: the density is exactly the one asked for.
    weight = torch.where(weight == 0, torch.ones_like(weight), weight) * mask[:outputs, :inputs]
    if two_four:
        order = torch.rand(outputs, groups, GROUP_INPUTS, generator=generator).argsort(-1)
        weight *= (order < 2).view(outputs, -1)[:, :inputs]
    scale = torch.rand(outputs, generator=generator) * 0.02 + 0.001
    return PackedWeight.pack(weight.to(torch.int8), scale)


def sample(
    rows: int,
    outputs: int,
    inputs: int,
    *,
    density: float = 1.0,
    activation: str | None = None,
    out: str | None = None,
    x_dtype: torch.dtype = torch.uint8,
    bias: bool = True,
    two_four: bool = False,
    bench: bool = False,
) -> Sample:
    """One case; extreme values (0 and 255) are always among the inputs.

    Args:
        rows, outputs, inputs: M, N and K.
        density: share of the groups that is kept.
        activation, out: as in the op; ``out="uint8"`` brings a scale at which some outputs clip.
        x_dtype: of the input.
        bias: whether there is one.
        two_four: see :func:`random_weight`.
        bench: whether the bench times it.
    """
    parts = [f"M{rows}-N{outputs}-K{inputs}-d{density:g}", str(x_dtype).removeprefix("torch.")]
    parts += [activation or "linear", out or "float32", *([] if bias else ["nobias"])]
    parts += ["2of4"] * two_four
    name = "-".join(parts)

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        packed = random_weight(outputs, inputs, density, generator, two_four=two_four)
        x = torch.randint(0, 256, (rows, inputs), generator=generator, dtype=torch.uint8)
        if rows:
            x[0, 0], x[-1, -1] = 0, 255
        x_scale, x_zero_point = 0.037, 113
        if x_dtype.is_floating_point:
            # Beyond the representable range on both sides, so that clipping is exercised.
            x = (torch.randn(rows, inputs, generator=generator) * 3).to(x_dtype)
        kwargs: dict[str, Any] = {
            "x_scale": x_scale,
            "x_zero_point": x_zero_point,
            "bias": torch.randn(outputs, generator=generator) if bias else None,
            "activation": activation,
            "out": out,
        }
        if out == "uint8":
            # About the spread of the accumulator, so that some outputs clip and most do not.
            spread = 0.037 * 0.011 * 127 * 147 * max(1.0, density * inputs) ** 0.5 / 3
            kwargs |= {"out_scale": spread / 100, "out_zero_point": 0 if activation else 128}
        return (x, packed), kwargs

    kept = round(density * ceil_div(inputs, GROUP_INPUTS)) * ceil_div(outputs, PANEL_OUTPUTS)
    in_bytes = rows * inputs * x_dtype.itemsize
    out_bytes = rows * outputs * {"uint8": 1, "bfloat16": 2, None: 4}[out]
    return Sample(
        name=name,
        make=make,
        macs=rows * kept * PANEL_OUTPUTS * GROUP_INPUTS,
        bytes_moved=in_bytes + out_bytes + kept * (PANEL_OUTPUTS * GROUP_INPUTS + 4),
        bench=bench,
        labels={"rows": rows, "outputs": outputs, "inputs": inputs, "density": density},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of rows (tiles of 6 or 12), outputs (panels of 32, lanes of 16) and inputs (groups
    of 4, taken in twos and fours for few rows; chunks of 32), every epilogue, empty and all-dropped
    weights, and the bench shapes."""
    cases = [sample(rows, 33, 36) for rows in (0, *range(1, 14), 23, 24, 25, 50)]
    cases += [sample(rows, 20, inputs) for rows in (1, 2) for inputs in (1, 7, 8, 9, 13, 63, 65)]
    cases += [sample(1, 40, 4096, density=0.3, out="uint8", activation="relu")]
    cases += [
        sample(5, outputs, 40, density=0.5) for outputs in (1, 15, 16, 17, 31, 32, 63, 64, 65)
    ]
    cases += [sample(7, 48, inputs, out="uint8") for inputs in (1, 2, 3, 4, 5, 31, 32, 33, 64, 127)]
    cases += [
        sample(13, 40, 70, density=0.6, activation=activation, out=out, x_dtype=dtype, bias=bias)
        for activation in (None, "relu", "gelu")
        for out in (None, "uint8", "bfloat16")
        for dtype in (torch.uint8, torch.float32, torch.bfloat16)
        for bias in (True, False)
    ]
    cases += [
        sample(rows, 70, inputs, density=density, activation="relu", out="uint8", two_four=True)
        for rows, inputs, density in ((1, 64, 1.0), (9, 65, 1.0), (17, 100, 0.5), (8, 3, 1.0))
    ]
    cases += [sample(9, 70, 36, density=0.0, out="uint8"), sample(3, 32, 4096, density=0.25)]
    cases += [
        sample(rows, 1024, 1024, density=density, activation="relu", out="uint8", bench=True)
        for rows in (50, 400)
        for density in (1.0, 0.6, 0.25)
    ]
    cases += [
        sample(1, size, size, density=density, activation="relu", out="uint8", bench=True)
        for size, density in ((1024, 1.0), (1024, 0.6), (2048, 1.0))
    ]
    return cases


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bit-exact against the reference; with GELU within the bound derived here.

    The kernel's erf is off by at most 4.3e-7 and its argument by one rounding (relative 2^-24,
    times |y| * erf'(y) <= 0.49); with the two roundings of v/2 * (1 + erf): |error| <= |v| *
    (2.15e-7 + 3 * 2^-24) < |v| * 4e-7. A uint8 output may differ by one where that error crosses
    a tie, and a bfloat16 one by one step: it lies between the bound's ends, rounded.
    """
    expected = sparse_int8_linear_reference(*args, **kwargs)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if kwargs.get("activation") != "gelu":
        assert torch.equal(actual, expected), "not bit-exact"
        return
    before = kwargs | {"activation": None, "out": None, "out_scale": None, "out_zero_point": None}
    value = sparse_int8_linear_reference(*args, **before)
    bound = value.abs().double() * 4e-7 + 1e-12
    exact = torch.nn.functional.gelu(value.double())
    if kwargs.get("out") == "bfloat16":
        low, high = (exact - bound).bfloat16(), (exact + bound).bfloat16()
        assert bool(((actual >= low) & (actual <= high)).all()), "beyond the GELU bound"
        return
    if kwargs.get("out") != "uint8":
        assert bool(((actual.double() - exact).abs() <= bound).all()), "beyond the GELU bound"
        return
    scale, zero_point = kwargs["out_scale"], kwargs["out_zero_point"]
    low = quantise((exact - bound).float(), scale, zero_point).int()
    high = quantise((exact + bound).float(), scale, zero_point).int()
    got = actual.int()
    assert bool(((got >= low) & (got <= high)).all()), "beyond the GELU bound"
