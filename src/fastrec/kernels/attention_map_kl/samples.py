"""Cases shared by the contract tests and the bench, and the op's tolerance."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.attention_map_kl.reference import attention_map_kl_reference
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern

LOG2 = AttentionPattern(16, "log2")


def sample(
    batch: int,
    heads: int,
    length: int,
    dims: int,
    pattern: AttentionPattern = LOG2,
    *,
    teacher_dims: int | None = None,
    lengths: tuple[int, ...] | None = None,
    merged: bool = False,
    bench: bool = False,
    **options: Any,
) -> Sample:
    """One case; NaNs fill the rows beyond the lengths.

    Args:
        batch, heads, length, dims: B, H, L and the student's D.
        pattern: the student's.
        teacher_dims: the teacher's D, where it differs.
        lengths: of each sequence.
        merged: strided views of one projection.
        bench: whether the bench times it.
        options: further arguments of the op.
    """
    teacher_dims = dims if teacher_dims is None else teacher_dims
    kind = f"w{pattern.window}-{str(pattern.offsets).replace(' ', '')}"
    parts = [f"B{batch}-H{heads}-L{length}-D{teacher_dims}-{dims}-{kind}"]
    parts += ["causal"] * pattern.causal + ["lengths"] * (lengths is not None) + ["merged"] * merged
    name = "-".join([*parts, *(f"{key}={value}" for key, value in options.items())])

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

        def pair(width: int) -> tuple[torch.Tensor, ...]:
            if merged:
                both = torch.randn(batch, length, 2, heads, width, generator=generator)
                return both.permute(2, 0, 3, 1, 4).unbind(0)
            return torch.randn(2, batch, heads, length, width, generator=generator).unbind(0)

        maps = (*pair(teacher_dims), *pair(dims))
        for b, valid in enumerate(lengths or ()):
            for x in maps:
                x[b, :, valid:] = torch.nan
        kwargs = dict(options)
        if lengths is not None:
            kwargs["lengths"] = torch.tensor(lengths)
        return (*maps, pattern), kwargs

    near = min(length, 2 * pattern.window + 1)
    seen = near + 2 * max((len(pattern.distances(length, h)) for h in range(heads)), default=0)
    rows = batch * heads * length
    return Sample(
        name=name,
        make=make,
        macs=rows * (dims + teacher_dims) * (seen // 2 + 1 if pattern.causal else seen),
        bytes_moved=4 * 2 * rows * (dims + teacher_dims),
        bench=bench,
        labels={"batch": batch, "heads": heads, "length": length, "dims": dims},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of length and dims, every kind of pattern and reduction; the bench's sizes."""
    small = AttentionPattern(3, "log2")
    cases = [sample(1, 2, n, 8, small) for n in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130)]
    cases += [sample(1, 1, 40, d, small) for d in (1, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130)]
    patterns = [
        AttentionPattern(0, "none"),
        AttentionPattern(200, "none"),
        AttentionPattern(5, "strided:16", causal=True),
        AttentionPattern(2, [[5, 40, 41], []], causal=True),
        AttentionPattern(1, "random", num_random=9, max_length=100, seed=4),
        AttentionPattern(20, [63]),
    ]
    cases += [sample(2, 2, 100, 20, p, teacher_dims=33, reduction="none") for p in patterns]
    cases += [
        sample(3, 2, 50, 12, small, lengths=(0, 17, 50), reduction="none"),
        sample(3, 2, 50, 12, small, lengths=(0, 17, 50)),
        sample(2, 2, 50, 12, small, lengths=(0, 0)),
        sample(2, 3, 65, 32, small, merged=True, teacher_causal=True, reduction="sum"),
        sample(1, 1, 65, 8, small, teacher_scale=4.0, student_scale=0.0),
        sample(0, 2, 5, 8, small, reduction="none"),
        sample(2, 2, 0, 8, small),
    ]
    timed = [sample(8, 4, 100, 32, bench=True)]
    timed += [sample(1, 4, n, 32, bench=True) for n in (512, 2048, 8192)]
    return [*cases, *timed]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Error against fp64 at most twice that of the same formula in fp32 torch, plus a floor.

    A row's KL is a mean of differences of scores, plus a difference of logs of sums: with scores of
    size S = scale max|q| max|k|, each of D products, 2 (D + 4) roundings of S for either map cover
    it (exp and log add less than 4 of 1). A "sum" or "none" adds that up over its rows.
    """
    exact = attention_map_kl_reference(*args, **kwargs)
    in_fp32 = attention_map_kl_reference(*args, **kwargs, dtype=torch.float32)
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if not exact.numel() or not args[0].numel():
        assert not actual.any()
        return
    tq, tk, sq, sk = (x.double().nan_to_num().norm(dim=-1).max().item() for x in args[:4])
    roundings = 4.0
    for name, q, k, x in (("teacher_scale", tq, tk, args[0]), ("student_scale", sq, sk, args[2])):
        scale = kwargs.get(name, x.shape[-1] ** -0.5)
        roundings += 2 * (x.shape[-1] + 4) * abs(scale) * q * k
    batch, heads, length, _ = args[2].shape
    rows = {"mean": 1, "none": length, "sum": batch * heads * length}
    floor = roundings * 2**-24 * rows[kwargs.get("reduction", "mean")]
    allowed = 2 * (in_fp32 - exact).abs().max().item() + floor
    error = (actual - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3g} > {allowed:.3g}"
