"""Ranges of activations seen in calibration, and the u8 scale and zero point chosen from them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrec.errors import ArgumentError

METHODS = ("minmax", "percentile", "mse")
LEVELS = 255  # 2^8 - 1
_MAX_SAMPLES = 1 << 18  # 1 MiB a layer for any number of batches
_SMALLEST_RANGE = 1e-20  # below, 1 / scale would overflow float32: treated as constant zero


def affine_u8(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale f32 [] and zero point i32 [] of the range [low, high] widened to hold 0.

    s = (max - min) / (2^8 - 1) (paper, III-B) and z = round(-min / s), so that 0 is exact: padding
    and ReLU zeros cost no error, and after a ReLU z is 0. Inside the range |x - s (q - z)| <= s /
    2. An empty or constant-zero range gives s = 1, z = 0.
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    width = high - low
    usable = width > _SMALLEST_RANGE
    scale = torch.where(usable, width / LEVELS, torch.ones_like(width))
    zero_point = torch.where(usable, -low / scale, torch.zeros_like(low)).round().clamp(0, LEVELS)
    return scale, zero_point.to(torch.int32)


def quantization_error(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mean squared error of ``x`` after u8 quantisation with the range [low, high]."""
    scale, zero_point = affine_u8(low, high)
    rounded = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, LEVELS)
    return (rounded - x).square().mean()


class RangeObserver:
    """Collects the values that enter one layer, over any number of batches, in bounded memory.

    Minimum and maximum are exact. Percentile and MSE work on an evenly strided, deterministic
    sample of at most 2^18 values; when it is full, every second one is dropped and the stride
    doubles.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._low = torch.tensor(float("inf"))
        self._high = torch.tensor(float("-inf"))
        self._samples: list[Tensor] = []
        self._stride = 1

    def observe(self, x: Tensor) -> None:
        """Add the values of ``x``, of any shape.

        Raises:
            ArgumentError: NaN or infinity among them.
        """
        if x.numel() == 0:
            return
        flat = x.detach().float().cpu().flatten()
        low, high = torch.aminmax(flat)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ArgumentError(
                "calibration",
                "batches that give finite activations",
                f"NaN or infinity at the input of {self.name!r}",
            )
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._samples.append(flat[:: self._stride].clone())
        while sum(len(s) for s in self._samples) > _MAX_SAMPLES:
            self._stride *= 2
            self._samples = [torch.cat(self._samples)[::2]]

    @property
    def is_empty(self) -> bool:
        """Whether no value was seen."""
        return not self._samples

    @property
    def is_zero(self) -> bool:
        """Whether every value seen was 0."""
        return bool((self._low == 0) & (self._high == 0))

    def range(self, method: str, percentile: float) -> tuple[Tensor, Tensor]:
        """(low, high) f32 scalars by ``method``; (0, 0) where nothing was seen."""
        if not self._samples:
            return torch.tensor(0.0), torch.tensor(0.0)
        if method == "minmax":
            return self._low, self._high
        samples = torch.cat(self._samples)
        if method == "percentile":
            return self._percentile(samples, percentile)
        return self._least_error(samples)

    def _percentile(self, samples: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
        """Two-sided: values beyond the percentile on either side saturate."""
        ordered = samples.sort().values
        last = len(ordered) - 1
        high = ordered[round(percentile / 100 * last)]
        low = ordered[round((1 - percentile / 100) * last)]
        # A feature that is zero in most rows must keep its few values.
        return (low if low < 0 else self._low), (high if high > 0 else self._high)

    def _least_error(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """The range, shrunk by a common factor, with the least squared error on the sample."""
        samples = samples[:: max(1, len(samples) >> 15)]  # 41 candidates on 2^15 values: 10 ms
        best = (self._low, self._high)
        least = quantization_error(samples, *best)
        for factor in torch.linspace(0.98, 0.2, 40):
            error = quantization_error(samples, self._low * factor, self._high * factor)
            if error < least:
                best, least = (self._low * factor, self._high * factor), error
        return best
