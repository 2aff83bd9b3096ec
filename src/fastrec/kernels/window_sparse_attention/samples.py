"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.kernels.window_sparse_attention.reference import window_sparse_attention_reference

LOG2 = AttentionPattern(16)
# Half the spacing of the numbers around 1.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def pairs(pattern: AttentionPattern, length: int, head: int) -> int:
    """How many (query, key) pairs one head of one sequence has."""
    steps = [*range(1, min(pattern.window, length - 1) + 1), *pattern.distances(length, head)]
    return length + sum(length - step for step in steps) * (1 if pattern.causal else 2)


def sample(
    batch: int,
    heads: int,
    length: int,
    dims: int,
    pattern: AttentionPattern = LOG2,
    *,
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] | None = None,
    jagged: tuple[int, ...] | None = None,
    layout: str = "plain",
    scale: float | None = None,
    bench: str | None = None,
) -> Sample:
    """One case; NaNs fill the rows beyond the lengths.

    Args:
        batch, heads, length, dims: B, H, L and D.
        pattern: which keys each query sees.
        dtype: of q, k and v.
        lengths: of each sequence.
        jagged: the sequences' lengths, in place of batch and length.
        layout: "plain"; "merged", views of one projection; "strided", D not contiguous.
        scale: as in the op.
        bench: its row in the results table; None: not timed.
    """
    if jagged is not None:
        batch, length = len(jagged), sum(jagged)
    offsets = "random" if pattern.offsets == "random" else str(pattern.offsets).replace(" ", "")
    parts = [f"B{batch}-H{heads}-L{length}-D{dims}-w{pattern.window}-{offsets}"]
    parts += ["causal"] * pattern.causal + ["jagged"] * (jagged is not None)
    parts += ["lengths"] * (lengths is not None) + [layout] * (layout != "plain")
    parts += [] if scale is None else [f"scale{scale:g}"]
    name = "-".join([*parts, str(dtype).removeprefix("torch.")])

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        kwargs: dict[str, Any] = {} if scale is None else {"scale": scale}
        if jagged is not None:
            qkv = torch.randn(length, 3, heads, dims, generator=generator).to(dtype)
            starts = torch.tensor([0, *jagged]).cumsum(0)
            return (*qkv.unbind(1), pattern), kwargs | {"cu_seqlens": starts}
        if layout == "merged":
            merged = torch.randn(batch, length, 3, heads, dims, generator=generator).to(dtype)
            q, k, v = merged.permute(2, 0, 3, 1, 4).unbind(0)
        elif layout == "strided":
            q, k, v = torch.randn(3, batch, heads, dims, length, generator=generator).to(dtype).mT
        else:
            q, k, v = torch.randn(3, batch, heads, length, dims, generator=generator).to(dtype)
        if lengths is not None:
            for b, valid in enumerate(lengths):
                k[b, :, valid:] = v[b, :, valid:] = torch.nan
            kwargs["lengths"] = torch.tensor(lengths)
        return (q, k, v, pattern), kwargs

    seen = sum(pairs(pattern, n, h) for n in (jagged or [length] * batch) for h in range(heads))
    rows = length if jagged is not None else batch * length
    labels = {"batch": batch, "heads": heads, "length": length, "dims": dims}
    return Sample(
        name=name,
        make=make,
        macs=2 * seen * dims,
        bytes_moved=4 * rows * heads * dims * dtype.itemsize,
        bench=bench is not None,
        labels=labels if bench is None else labels | {"goal": bench},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of rows (8, 16) and dims, windows beyond L, every kind of offsets, causal or not,
    padding, jagged batches, views, empty input, 16-bit floats, and the bench's rows."""
    w3 = AttentionPattern(3, "log2")
    cases = [sample(2, 2, n, 8, w3) for n in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130)]
    cases += [sample(1, 2, 37, dims, w3) for dims in (1, 3, 7, 9, 15, 17, 31, 32, 33, 48, 63, 65)]
    cases += [sample(1, 1, 21, dims, w3) for dims in (96, 127, 128, 129, 255, 256)]
    for causal in (False, True):
        kinds = (
            AttentionPattern(0, "none", causal),
            AttentionPattern(0, "log2", causal),
            AttentionPattern(200, "none", causal),
            AttentionPattern(5, "strided:7", causal),
            AttentionPattern(2, (3, 16, 40, 99), causal),
            AttentionPattern(2, ((30,), (5, 17, 33), ()), causal),
            AttentionPattern(4, "random", causal, num_random=6, max_length=64, seed=3),
            AttentionPattern(16, "log2", causal),
        )
        cases += [sample(2, 3, 75, 20, kind) for kind in kinds]
        cases += [sample(4, 1, 40, 16, kind, lengths=(0, 1, 23, 40)) for kind in kinds[1:4]]
        cases += [sample(0, 2, 0, 33, kinds[4], jagged=(0, 1, 17, 50, 0))]
    cases += [sample(0, 2, 5, 8), sample(2, 2, 0, 8), sample(0, 2, 0, 8, jagged=())]
    cases += [sample(2, 3, 50, 33, layout=layout) for layout in ("merged", "strided")]
    cases += [sample(1, 2, 40, 16, scale=scale) for scale in (0.0, -0.7, 2.0)]
    for dtype in (torch.bfloat16, torch.float16):
        cases += [sample(2, 2, 70, dims, w3, dtype=dtype) for dims in (1, 8, 33, 64)]
        cases += [sample(2, 2, 70, 32, w3, dtype=dtype, lengths=(0, 41), layout="merged")]
    return [
        *cases,
        sample(1, 4, 100, 32, bench="L=100, B=1"),
        sample(64, 4, 100, 32, bench="L=100, B=64"),
        sample(1, 4, 4096, 32, bench="L=4096"),
        sample(1, 4, 8192, 32, bench="L=8192"),
        sample(1, 4, 8192, 32, dtype=torch.bfloat16, bench="L=8192, bf16"),
    ]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Error against fp64 at most twice that of the same formula in fp32 torch, plus a floor.

    The floor: a weight is exp(s), s = scale * q.k a sum of D products, off by at most (D + 2)
    roundings of the sum of their sizes, S = |scale| * max |q| . |k|, on both sides of the quotient;
    exp, the sum over n keys and the weighted sum add at most (n + 8) roundings of max |v|. Random
    signs keep real errors near the root of that, so a quarter of the bound is the floor. A 16-bit
    result adds its own rounding, half a spacing of the largest |v|, as torch's would.
    """
    q, k, v, pattern = args
    exact = window_sparse_attention_reference(*args, **kwargs)
    assert isinstance(exact, torch.Tensor)
    assert actual.dtype == q.dtype
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if not exact.numel():
        return
    torch_fp32 = window_sparse_attention_reference(*args, **kwargs, dtype=torch.float32)
    q_size, k_size, v_size = (x.double().nan_to_num().norm(dim=-1).max().item() for x in (q, k, v))
    largest = v.double().nan_to_num().abs().max().item()
    scale = abs(kwargs.get("scale", q.shape[-1] ** -0.5))
    length = q.shape[-2] if "cu_seqlens" not in kwargs else len(q)
    keys = 2 * (min(pattern.window, length) + len(pattern.distances(length))) + 1
    roundings = 2 * (q.shape[-1] + 2) * scale * q_size * k_size + keys + 8
    floor = roundings / 4 * 2**-24 * min(largest, v_size)
    allowed = 2 * (torch_fp32 - exact).abs().max().item() + floor
    if q.dtype != torch.float32:
        allowed += ROUNDING[q.dtype] * largest
    assert not bool(actual.isnan().any()), "NaN in the output"
    error = (actual - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"
