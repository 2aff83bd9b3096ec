"""``window_sparse_attention`` beside FlexAttention and SDPA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastrec import kernels
from fastrec.kernels.window_sparse_attention import AttentionPattern
from fastrec.kernels.window_sparse_attention.reference import window_sparse_attention_reference
from fastrec.kernels.window_sparse_attention.samples import pairs
from gpu.sheet import Contender, Sheet, Work
from gpu.timing import Call

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
DENSE = "dense: every key, another function"


LONG = (8, 8, 8192, 64), AttentionPattern(64)
SHORT = (64, 4, 100, 32), AttentionPattern(16)


def _attends(sheet: Sheet, pattern: AttentionPattern, length: int) -> dict[str, Attend]:
    return {
        "fastrec, Triton": functools.partial(_ours, pattern=pattern),
        "SDPA flash": _flash(),
        "FlexAttention, compiled": _flex(sheet, pattern, length),
    }


def long(sheet: Sheet) -> None:
    """B=8, H=8, L=8,192, D=64, window 64 + log2: forward, then forward and backward."""
    shape, pattern = LONG
    here = sheet.pick(shape, (1, 2, 200, 16))
    attends = _attends(sheet, pattern, here[2])
    _forward(sheet, shape, here, pattern, attends)
    _backward(sheet, shape, here, pattern, attends)


def autotuned(sheet: Sheet) -> None:
    """The same against FlexAttention with max-autotune, whose compilation may take all the time."""
    shape, pattern = LONG
    attends = {
        "fastrec, Triton": functools.partial(_ours, pattern=pattern),
        "FlexAttention, max-autotune": _flex(
            sheet, pattern, shape[2], "max-autotune-no-cudagraphs"
        ),
    }
    _forward(sheet, shape, shape, pattern, attends)
    _backward(sheet, shape, shape, pattern, attends)


def short(sheet: Sheet) -> None:
    """B=64, H=4, L=100, D=32: attention alone."""
    shape, pattern = SHORT
    here = sheet.pick(shape, (2, 2, 33, 16))
    attends = _attends(sheet, pattern, here[2])
    _forward(sheet, shape, here, pattern, attends)


def _ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, pattern: AttentionPattern
) -> torch.Tensor:
    return kernels.window_sparse_attention(q, k, v, pattern, backend="triton")


def _flash() -> Attend:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _flex(sheet: Sheet, pattern: AttentionPattern, length: int, mode: str = "default") -> Attend:
    """With arithmetic for a mask, which is faster than a table; compiled at the first call."""
    window = pattern.window

    def seen(b: Any, h: Any, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        distance = (i - j).abs()
        return (distance <= window) | ((distance & (distance - 1)) == 0)

    @functools.cache
    def made() -> tuple[Any, Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(seen, None, None, length, length, device=sheet.device.type)
        if not sheet.gpu:  # to compile it takes longer than all the rest here
            return flex_attention, mask
        return torch.compile(flex_attention, mode=mode), mask

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        call, mask = made()
        return call(q, k, v, block_mask=mask)

    return attend


def _maker(sheet: Sheet, shape: tuple[int, ...], gradients: bool) -> Callable[[], Any]:
    def inputs() -> tuple[torch.Tensor, ...]:
        make = lambda: torch.randn(shape, device=sheet.device, dtype=torch.bfloat16)  # noqa: E731
        qkv = [make().requires_grad_(gradients) for _ in range(3)]
        return (*qkv, make()) if gradients else tuple(qkv)

    return inputs


def _name(shape: tuple[int, ...], pattern: AttentionPattern) -> str:
    b, h, length, dims = shape
    return f"attention B={b} H={h} L={length} D={dims}, window {pattern.window} + log2, bf16"


def _work(shape: tuple[int, ...], pattern: AttentionPattern, products: int, moved: int) -> Work:
    b, h, length, dims = shape
    seen = b * h * pairs(pattern, length, 0)
    return Work(moved * b * h * length * dims * 2, products * seen * dims, "bf16")


def _first(x: torch.Tensor) -> torch.Tensor:
    """One head of one sequence: what a definition of L x L can hold."""
    return x[:1, :1]


def _reference(pattern: AttentionPattern) -> Callable[..., torch.Tensor]:
    def expected(*inputs: torch.Tensor) -> torch.Tensor:
        parts = [_first(x.detach()) for x in inputs[:3]]
        out = window_sparse_attention_reference(*parts, pattern, dtype=torch.float32)
        assert isinstance(out, torch.Tensor)
        return out

    return expected


def _dense(*inputs: torch.Tensor) -> torch.Tensor:
    q, k, v = (_first(x.detach()).float() for x in inputs[:3])
    return F.scaled_dot_product_attention(q, k, v)


def _forward(
    sheet: Sheet,
    shape: tuple[int, ...],
    here: tuple[int, ...],
    pattern: AttentionPattern,
    attends: dict[str, Attend],
) -> None:
    def contender(name: str, attend: Attend) -> Contender:
        def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
            return lambda: attend(q, k, v)

        dense = name.startswith("SDPA")
        wanted = _dense if dense else None
        return Contender(prepare, wanted, part=_first, note=DENSE if dense else "")

    with torch.no_grad():
        sheet.compare(
            f"{_name(shape, pattern)}, forward",
            _work(shape, pattern, products=2, moved=4),
            _maker(sheet, here, gradients=False),
            {name: contender(name, attend) for name, attend in attends.items()},
            _reference(pattern),
        )


def _backward(
    sheet: Sheet,
    shape: tuple[int, ...],
    here: tuple[int, ...],
    pattern: AttentionPattern,
    attends: dict[str, Attend],
) -> None:
    def contender(attend: Attend) -> Contender:
        def prepare(q: Any, k: Any, v: Any, d_out: torch.Tensor) -> Call:
            def call() -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(attend(q, k, v), (q, k, v), d_out)

            return call

        return Contender(prepare, part=lambda found: [_first(x) for x in found])

    def expected(*inputs: torch.Tensor) -> list[torch.Tensor]:
        q, k, v, d_out = (_first(x.detach()).float() for x in inputs)
        parts = [x.requires_grad_() for x in (q, k, v)]
        out = window_sparse_attention_reference(*parts, pattern, dtype=torch.float32)
        assert isinstance(out, torch.Tensor)
        return list(torch.autograd.grad(out, parts, d_out))

    sheet.compare(
        f"{_name(shape, pattern)}, forward and backward",
        # Two products forward, five backward; q, k, v, out and d_out read, four and lse written.
        _work(shape, pattern, products=7, moved=12),
        _maker(sheet, here, gradients=True),
        {name: contender(attend) for name, attend in attends.items() if "SDPA" not in name},
        expected,
    )
