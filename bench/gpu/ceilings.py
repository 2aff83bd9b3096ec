"""What this GPU reaches on a copy and on large products; the report's shares are of these."""

from __future__ import annotations

import torch

from gpu.sheet import Sheet
from gpu.timing import Call, Replay, in_turn


def measure(sheet: Sheet) -> None:
    """Rows ``ceiling``: GB/s of a copy of 1 GiB, read and written; Gop/s of products of 8,192."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    _ceiling(sheet, "copy", lambda: target.copy_(source), 2 * source.numel())
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    _ceiling(sheet, "bf16", lambda: a @ a, 2 * 8192**3)
    b = torch.randint(-9, 9, (8192, 8192), device="cuda", dtype=torch.int8)
    _ceiling(sheet, "int8", lambda: torch._int_mm(b, b.t()), 2 * 8192**3)


def _ceiling(sheet: Sheet, name: str, call: Call, amount: int) -> None:
    call()
    us = in_turn([Replay.of([call])])[0].p50_ms * 1e3
    sheet.add(ceiling=name, per_s=1e6 * amount / us)
