"""Cases shared by the contract tests and the bench; the op is exact, so ``compare`` is equality."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch

from fastrec.kernels._registry import Sample
from fastrec.kernels.window_sparse_attention.pattern import AttentionPattern
from fastrec.kernels.window_sparse_attention_int8.reference import (
    window_sparse_attention_int8_reference,
)

LOG2 = AttentionPattern(16, "log2")


def sample(
    batch: int,
    heads: int,
    length: int,
    dims: int,
    pattern: AttentionPattern = LOG2,
    *,
    lengths: tuple[int, ...] | None = None,
    starts: tuple[int, ...] | None = None,
    q_dtype: torch.dtype = torch.int8,
    k_dtype: torch.dtype = torch.int8,
    v_dtype: torch.dtype = torch.float32,
    keys: int | None = None,
    out: str | None = None,
    merged: bool = False,
    bench: bool = False,
) -> Sample:
    """One case; NaNs fill a float v beyond the lengths.

    Args:
        batch, heads, length, dims: B, H, L and D.
        pattern: which keys each query sees.
        lengths: of each sequence.
        starts: the batch's one sequence, merged, is cut there into a jagged batch.
        q_dtype, k_dtype, v_dtype: of q, k and v.
        keys: their number, where it is not that of the queries.
        out: as in the op.
        merged: strided views of one projection.
        bench: whether the bench times it.
    """
    key_rows = length if keys is None else keys
    shape = f"B{batch}-H{heads}-L{length}-D{dims}"
    shape += "" if keys is None else f"-keys{keys}"
    kind = f"w{pattern.window}-{str(pattern.offsets).replace(' ', '')}"
    parts = [shape, kind, *(["causal"] if pattern.causal else [])]
    parts += [str(q_dtype)[6:], str(v_dtype)[6:], out or "float32"]
    name = "-".join(parts) + ("-lengths" if lengths else "") + ("-merged" if merged else "")
    name += ("-jagged" if starts else "") + ("-k8" if k_dtype == torch.uint8 else "")

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

        def layout(rows: int) -> tuple[int, ...]:
            return (batch, rows, heads, dims) if merged else (batch, heads, rows, dims)

        def integers(rows: int, dtype: torch.dtype) -> torch.Tensor:
            low = 0 if dtype == torch.uint8 else -128
            x = torch.randint(low, low + 256, layout(rows), generator=generator, dtype=dtype)
            return x.transpose(1, 2) if merged else x

        q, k = integers(length, q_dtype), integers(key_rows, k_dtype)
        kwargs: dict[str, Any] = {"q_scale": 0.02, "k_scale": 0.015}
        if q.dtype == torch.uint8:
            kwargs["q_zero_point"] = 77
        if v_dtype != torch.float32:
            v = integers(key_rows, v_dtype)
            sequences = batch if starts is None else len(starts) - 1
            kwargs["v_scale"] = torch.rand(sequences, heads, generator=generator) + 0.01
        else:
            v = torch.randn(layout(key_rows), generator=generator) * 3
            v = v.transpose(1, 2) if merged else v
            for b, valid in enumerate(lengths or ()):
                v[b, :, valid:] = torch.nan
        if lengths is not None:
            kwargs["lengths"] = torch.tensor(lengths)
        if out is not None:
            kwargs |= {"out": out, "out_scale": 0.013, "out_zero_point": 120}
        if starts is not None:
            kwargs["cu_seqlens"] = torch.tensor(starts)
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return (q, k, v, pattern), kwargs

    near = min(key_rows, 2 * pattern.window + 1)
    seen = near + 2 * max((len(pattern.distances(length, h)) for h in range(heads)), default=0)
    elements, of_keys = batch * heads * length * dims, batch * heads * key_rows * dims
    return Sample(
        name=name,
        make=make,
        macs=2 * elements * (seen // 2 + 1 if pattern.causal else seen),
        bytes_moved=elements * (2 if out else 5) + of_keys * (1 + v_dtype.itemsize),
        bench=bench,
        labels={"batch": batch, "heads": heads, "length": length, "dims": dims},
    )


def samples() -> Sequence[Sample]:
    """Lane edges of length and dims, every kind of pattern, dtype and layout; the bench's sizes."""
    u8, s8 = torch.uint8, torch.int8
    small = AttentionPattern(3, "log2")
    cases = [sample(1, 2, n, 8, small) for n in (1, 2, 15, 16, 17, 31, 63, 64, 65, 130)]
    cases += [sample(1, 1, 40, d, small) for d in (1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 256)]
    patterns = [
        AttentionPattern(0, "none"),
        AttentionPattern(200, "none"),
        AttentionPattern(5, "strided:16", causal=True),
        AttentionPattern(2, "strided:7"),
        AttentionPattern(2, [[5, 40, 41], []], causal=True),
        AttentionPattern(1, "random", num_random=9, max_length=100, seed=4),
        AttentionPattern(20, [63]),
    ]
    cases += [sample(2, 2, 100, 20, p, v_dtype=v) for p in patterns for v in (s8, torch.float32)]
    cases += [
        sample(3, 2, 50, 12, small, lengths=(0, 17, 50), q_dtype=u8),
        sample(2, 2, 50, 12, patterns[2], lengths=(3, 33), v_dtype=s8, out="uint8"),
        sample(2, 3, 65, 32, small, q_dtype=u8, merged=True, out="uint8"),
        sample(1, 2, 90, 20, small, starts=(0, 0, 1, 18, 90, 90), merged=True),
        sample(1, 2, 90, 12, patterns[2], starts=(0, 50, 90), v_dtype=s8, out="uint8"),
        sample(1, 2, 0, 12, small, starts=(0,), v_dtype=s8),
        *(
            sample(2, 2, n, 20, p, keys=m, q_dtype=u8, k_dtype=u8, v_dtype=u8, merged=True)
            for n, m in ((1, 40), (50, 33), (17, 16), (33, 100), (5, 0))
            for p in (AttentionPattern(100), small)
        ),
        sample(2, 2, 50, 32, AttentionPattern(99), keys=99, lengths=(99, 1), k_dtype=u8),
        sample(2, 2, 150, 9, AttentionPattern(200), keys=70, k_dtype=u8, v_dtype=u8, out="uint8"),
        sample(0, 2, 5, 8, small),
        sample(2, 2, 0, 8, small),
    ]
    timed = [sample(b, 4, 100, 32, bench=True) for b in (1, 64)]
    # As the blocks and the cross attention of the canonical ranker have it.
    whole = {"q_dtype": u8, "k_dtype": u8, "v_dtype": u8, "merged": True, "bench": True}
    timed += [
        sample(1, 4, n, 32, AttentionPattern(100), keys=100, out="uint8", **whole)
        for n in (100, 50)
    ]
    timed += [sample(1, 4, n, d, bench=True) for n in (512, 2048, 8192) for d in (32, 64)]
    return [*cases, *timed]


def compare(actual: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Equal to the last bit: scores and sums are integers, floats single IEEE steps."""
    exact = window_sparse_attention_int8_reference(*args, **kwargs)
    assert actual.dtype == exact.dtype
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    different = (actual != exact).sum().item()
    assert different == 0, f"{different} of {exact.numel()} elements differ"
