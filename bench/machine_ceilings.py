"""The machine's limits, measured in the same run as what is held against them."""

from __future__ import annotations

import time

import numpy as np

from fastrec.kernels._compiled import native


def vpdpbusd_peak_gops() -> float:
    """10^9 operations a second of one core, vpdpbusd on registers alone (best of 0.2 s)."""
    return float(native().vpdpbusd_peak_gops(0.2))


def copy_bandwidth_gbs(megabytes: float = 256.0) -> float:
    """10^9 bytes read and written a second by one core copying an array larger than the caches."""
    source = np.ones(int(megabytes * 2**20), dtype=np.uint8)
    target = np.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9
