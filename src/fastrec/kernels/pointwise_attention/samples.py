"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.pointwise_attention.buckets import log_time_edges
from fastrec.kernels.pointwise_attention.reference import pointwise_attention_reference

# Half the spacing of the numbers around 1.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def pairs(rows: int, targets: int, causal: bool) -> int:
    """How many (query, key) pairs one head of one sequence has."""
    history = rows - targets
    inside = history * (history + 1) // 2 if causal else history * history
    return inside + targets * (history + 1)


def sample(
    batch: int,
    heads: int,
    length: int,
    dims: int,
    value_dims: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] | None = None,
    jagged: tuple[int, ...] | None = None,
    targets: int | tuple[int, ...] = 0,
    positions: int = 0,
    buckets: int = 0,
    by_head: bool = False,
    layout: str = "plain",
    bench: bool = False,
    **options: Any,
) -> Sample:
    """``jagged``: the sequences' lengths, in place of batch and length. ``positions``, ``buckets``:
    sizes of the tables, 0: none. ``layout``: "plain", "merged", views of one projection, or
    "strided", D not contiguous. NaNs fill what lies beyond the length."""
    value_dims = dims if value_dims is None else value_dims
    if jagged is not None:
        batch, length = len(jagged), sum(jagged)
    parts = [f"B{batch}-H{heads}-L{length}-D{dims}-{value_dims}", str(dtype).removeprefix("torch.")]
    parts += ["jagged"] * (jagged is not None) + ["lengths"] * (lengths is not None)
    parts += [f"targets{targets}".replace(" ", "")] * bool(targets) + [layout] * (layout != "plain")
    parts += [f"P{positions}"] * bool(positions) + [f"buckets{buckets}"] * bool(buckets)
    parts += ["by_head"] * by_head + [f"{key}={value}" for key, value in options.items()]
    name = "-".join(parts)

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        kwargs: dict[str, Any] = dict(options)
        if jagged is not None:
            merged = draw(length, heads, 2 * dims + value_dims).to(dtype)
            kwargs["cu_seqlens"] = torch.tensor([0, *jagged]).cumsum(0)
            kwargs.setdefault("norm_length", max(jagged, default=0) + 1)
        elif layout == "merged":
            merged = draw(batch, length, heads, 2 * dims + value_dims).to(dtype).transpose(1, 2)
        else:
            merged = draw(batch, heads, length, 2 * dims + value_dims).to(dtype)
        if layout == "strided":
            merged = merged.mT.contiguous().mT
        q, k, v = merged.split([dims, dims, value_dims], -1)
        if layout == "plain" and jagged is None:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        shape = (length,) if jagged is not None else (batch, length)
        if positions:
            size = 2 * positions - 1
            kwargs["position_bias"] = draw(heads, size) if by_head else draw(size)
        if buckets:
            kwargs["time_bias"] = draw(heads, buckets) if by_head else draw(buckets)
            kwargs["time_edges"] = log_time_edges(buckets)
            gaps = (3 * draw(*shape)).exp().long()
            kwargs["timestamps"] = 1_500_000_000 + gaps.cumsum(-1)
        for b, valid in enumerate(lengths or ()):
            for x in (q, k, v):
                x[b, :, valid:] = torch.nan
        if lengths is not None:
            kwargs["lengths"] = torch.tensor(lengths)
        if targets:
            kwargs["targets"] = targets if isinstance(targets, int) else torch.tensor(targets)
        return (q, k, v), kwargs

    sizes = jagged or lengths or [length] * batch
    own = [targets] * len(sizes) if isinstance(targets, int) else targets
    causal = options.get("causal", True)
    seen = heads * sum(pairs(n, t, causal) for n, t in zip(sizes, own, strict=True))
    rows = length if jagged is not None else batch * length
    return Sample(
        name=name,
        make=make,
        macs=seen * (dims + value_dims),
        bytes_moved=2 * rows * heads * (dims + value_dims) * dtype.itemsize,
        bench=bench,
        labels={"batch": batch, "heads": heads, "length": length, "dims": dims},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of rows (16, 32), chunks of keys (60) and dims, targets, both tables, padding,
    jagged batches, views, empty input, 16-bit floats, and the bench's rows."""
    tables: dict[str, Any] = {"positions": 20, "buckets": 16}
    sizes = (1, 2, 15, 16, 17, 31, 32, 33, 59, 60, 61, 63, 64, 65, 130)
    cases = [sample(2, 2, n, 8, **tables) for n in sizes]
    cases += [sample(2, 2, n, 8, causal=False, targets=min(n, 5)) for n in sizes]
    cases += [sample(1, 2, 37, dims) for dims in (1, 3, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65)]
    cases += [sample(1, 1, 21, n, 257 - n) for n in (1, 16, 127, 128, 129, 256)]
    for causal in (True, False):
        options: dict[str, Any] = {"causal": causal}
        cases += [
            sample(2, 3, 75, 20, targets=(0, 75), **options),
            sample(2, 3, 75, 20, 12, targets=40, **tables, by_head=True, **options),
            sample(1, 2, 70, 16, positions=1, targets=1, **options),
            sample(1, 2, 70, 16, positions=200, **options),
            sample(1, 2, 70, 16, buckets=1, **options),
            sample(1, 2, 70, 16, buckets=129, **options),
            sample(
                4, 1, 40, 16, lengths=(0, 1, 23, 40), targets=(0, 1, 7, 40), **tables, **options
            ),
            sample(0, 2, 0, 33, jagged=(0, 1, 17, 50, 0), targets=(0, 0, 3, 31, 0), **options),
            sample(0, 2, 0, 33, 5, jagged=(64, 1, 33), **tables, by_head=True, **options),
        ]
    cases += [sample(0, 2, 5, 8), sample(2, 2, 0, 8), sample(0, 2, 0, 8, jagged=())]
    cases += [sample(2, 3, 50, 33, layout=layout, **tables) for layout in ("merged", "strided")]
    cases += [sample(1, 2, 40, 16, scale=scale) for scale in (0.0, -0.7, 2.0, 300.0)]
    cases += [sample(1, 2, 40, 16, norm_length=7.5)]
    for dtype in (torch.bfloat16, torch.float16):
        cases += [sample(2, 2, 70, dims, dtype=dtype, **tables) for dims in (1, 8, 33, 64)]
        cases += [sample(2, 2, 70, 32, dtype=dtype, lengths=(0, 41), layout="merged")]
    large: dict[str, Any] = {"positions": 1024, "buckets": 129, "bench": True}
    return [
        *cases,
        sample(1, 4, 256, 64, bench=True),
        sample(1, 4, 256, 64, **large),
        sample(1, 4, 1024, 64, bench=True),
        sample(1, 4, 1024, 64, **large),
        sample(1, 4, 1280, 64, targets=256, **large),
    ]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Error against fp64 at most twice that of the same formula in fp32 torch, plus a floor.

    The floor: a score is a sum of D products and two biases, off by at most (D + 4) roundings of
    S = |scale| max |q| max |k| + max |bias|. SiLU's slope is below 1.1, and its exponential (2e-7,
    4 roundings, and the rounding of x log2(e), which x^2 s (1 - s) < 0.5 carries over), its
    reciprocal and its products add 8 roundings of |SiLU| <= S and 1 of 1. A sum over n keys adds n
    roundings: all in all n (1.1 (D + 4) + 8 + n) S + n roundings of max |v| / norm. Random signs
    keep real errors near the root of that, so a quarter of the bound is the floor. A 16-bit result
    adds its own rounding, half a spacing of the largest.
    """
    q, k, v = args
    exact = pointwise_attention_reference(*args, **kwargs)
    assert actual.dtype == q.dtype
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if not exact.numel():
        return
    torch_fp32 = pointwise_attention_reference(*args, **kwargs, dtype=torch.float32)
    q_size, k_size = (x.double().nan_to_num().norm(dim=-1).max().item() for x in (q, k))
    largest = v.double().nan_to_num().abs().max().item()
    size = abs(kwargs.get("scale", q.shape[-1] ** -0.5)) * q_size * k_size
    for name in ("position_bias", "time_bias"):
        if name in kwargs:
            size += kwargs[name].abs().max().item()
    n = len(q) if "cu_seqlens" in kwargs else q.shape[2]
    norm = kwargs.get("norm_length", n)
    roundings = n * ((1.1 * (q.shape[-1] + 4) + 8 + n) * size + 1)
    floor = roundings / 4 * 2**-24 * largest / norm
    allowed = 2 * (torch_fp32 - exact).abs().max().item() + floor
    if q.dtype != torch.float32:
        sums = pointwise_attention_reference(q, k, v.abs(), **kwargs).abs().max().item()
        allowed += ROUNDING[q.dtype] * (exact.abs().max().item() + sums) + 2**-24
    assert not bool(actual.isnan().any()), "NaN in the output"
    error = (actual - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"
