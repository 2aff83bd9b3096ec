"""Edges of the time buckets of ``pointwise_attention``."""

from __future__ import annotations

import math

import torch

from fastrec.errors import ArgumentError

# Differences of times count as at most this, which a double still holds exactly.
MAX_TIME = 1 << 53
MAX_BUCKETS = 4096


def log_time_edges(buckets: int, step: float = 0.301) -> torch.Tensor:
    """Edges of buckets of equal width in the logarithm of a time difference.

    A difference n lies in bucket floor(ln(max(n, 1)) / step), at most ``buckets - 1``. The default
    step is that of HSTU's published code (128 buckets and one for all beyond them).

    Args:
        buckets: how many, 1 to 4,096.
        step: width of a bucket, > 0; as many buckets as ln(2^53) has steps are of use.

    Returns:
        int64 [buckets - 1], each the smallest difference of the bucket after it.

    Raises:
        ArgumentError: a value outside what is written above.
    """
    if not isinstance(buckets, int) or not 1 <= buckets <= MAX_BUCKETS:
        raise ArgumentError("buckets", f"an integer in 1..{MAX_BUCKETS}", buckets)
    if not (math.isfinite(step) and step > 0):
        raise ArgumentError("step", "a finite number > 0", step)
    last = math.log(MAX_TIME)
    edges = [
        MAX_TIME if n * step >= last else math.ceil(math.exp(n * step)) for n in range(1, buckets)
    ]
    return torch.tensor(edges, dtype=torch.int64)


def buckets_of(query_times: torch.Tensor, times: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """int64 [Lq, L]: how many edges the difference of each pair of times has reached."""
    high = torch.maximum(query_times[:, None], times[None])
    low = torch.minimum(query_times[:, None], times[None])
    apart = high - low
    # A difference of int64 that overflows is beyond all edges.
    apart = torch.where((apart < 0) | (apart > MAX_TIME), MAX_TIME, apart)
    return torch.searchsorted(edges, apart, right=True)
