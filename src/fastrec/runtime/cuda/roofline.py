"""A GPU's limits: the time that bytes and operations take at the rates of its data sheet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Rates of a data sheet (dense, without 2:4 sparsity): bytes/s and operations/s by type."""

    name: str
    bytes_per_s: float
    ops_per_s: dict[str, float]

    def seconds(self, moved: int, macs: int, dtype: str) -> float:
        """The least time: the slower of memory and arithmetic; a multiply-add is 2 operations."""
        return max(moved / self.bytes_per_s, 2 * macs / self.ops_per_s[dtype])


_HOPPER = {"fp32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12, "int8": 1978.9e12}
# NVIDIA's data sheets of the SXM modules.
GPUS = {
    "H200": Gpu("H200", 4.8e12, _HOPPER),
    "H100": Gpu("H100", 3.35e12, _HOPPER),
}
