"""Correct first: what an engine returns is compared before it is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Root mean square of the error over that of the values. fp32: sums of some thousand rounded
# products in different orders differ by about sqrt(1000) * 2^-24 = 2e-6 of their size; 1e-4 also
# lets cancelling sums pass, and any wrong operator breaks it. bf16 rounds at 2^-9 before and after.
# int8: rounding a value that spans some hundred steps is off by a third of a step at each of input,
# weight and output.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2}


def precision_of(engine: str, default: str = "fp32") -> str:
    """An engine's precision, by its name."""
    return next((name for name in ("int8", "bf16") if name in engine), default)


def as_tensors(output: Any) -> list[torch.Tensor]:
    """Any engine's output as float64 tensors."""
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in as_tensors(part)]
    tensor = torch.as_tensor(output)
    return [(tensor.dequantize() if tensor.is_quantized else tensor).detach().double()]


def _parts(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple | list) else [output]


def error_of(actual: Any, expected: Any) -> float:
    """The largest relative root mean square error of the parts; infinite where shapes differ."""
    got, want = as_tensors(actual), as_tensors(expected)
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if not b.numel():
            continue
        error = ((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def why_wrong(
    call: Callable[[], Any],
    expected: Any,
    value: Callable[[Any], Any],
    engine: str,
    precision: str,
) -> tuple[float | None, str | None]:
    """(error, reason not to time it or None). ``expected`` has passed the op's own comparison.

    An engine that says that it does other work (``call.other_work``) has to run and to be finite.
    """
    try:
        got = value(call())
    except Exception as error:  # a rival's failure is reported, and the run goes on
        return None, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if getattr(call, "other_work", None):
        finite = all(bool(tensor.isfinite().all()) for tensor in as_tensors(got))
        return None, None if finite else "wrong: not finite"
    error = error_of(got, expected)
    # Codes that differ by one where a value lies on a tie.
    integers = any(not torch.as_tensor(part).is_floating_point() for part in _parts(expected))
    codes = "int8" if integers else precision
    allowed = max(TOLERANCE[name] for name in (precision, codes, precision_of(engine, precision)))
    return error, None if error <= allowed else f"wrong: error {error:.2g} > {allowed:g}"
