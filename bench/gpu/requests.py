"""Launches that the profiler counts in a request, and what a thousand lengths compile."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch

import fastrec
from fastrec import kernels
from fastrec.kernels.window_sparse_attention import AttentionPattern
from gpu.ranker import CANDIDATES, LENGTH, model, quantised, request
from gpu.sheet import Sheet, said

LENGTHS = 1000


def count(sheet: Sheet) -> None:
    """Rows with ``launches``, or with ``compiled``: kernels compiled for a thousand lengths."""
    ranker = model(sheet.gpu)
    for precision in ("bf16", "int8"):
        what = f"launches a request, ranker {precision}, B=1"
        try:
            twin = ranker if precision == "bf16" else quantised(ranker)
            sheet.add(what=what, engine="fastrec", **_launches(sheet, twin, precision))
        except Exception as error:
            sheet.add(what=what, engine="fastrec", why=said(error))
    for name, compiled in (("attention", _attention), ("ranker", _ranker)):
        what = f"kernels compiled for {LENGTHS} distinct lengths, {name}"
        try:
            sheet.add(what=what, engine="fastrec", **compiled(sheet))
        except Exception as error:
            sheet.add(what=what, engine="fastrec", why=said(error))


def _launches(sheet: Sheet, ranker: Any, precision: str) -> dict[str, Any]:
    if not sheet.gpu:
        return {"why": "not counted: torch sees no CUDA device"}
    inputs = request(ranker, 1)
    wanted = None if precision == "int8" else precision
    engine = fastrec.compile(ranker, inputs, "cuda", precision=wanted)
    arrays = [t.numpy() for t in inputs]
    engine(*arrays)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        engine(*arrays)
        torch.cuda.synchronize()
    names: collections.Counter[str] = collections.Counter()
    for event in profile.events():
        copies = event.name.startswith(("Memcpy", "Memset"))
        if event.device_type == torch.autograd.DeviceType.CUDA and not copies:
            names[event.name] += 1
    return {"launches": sum(names.values()), "kernels": dict(names)}


def held(*functions: Any) -> int:
    """Compiled kernels that Triton holds of these functions."""
    return sum(len(found[0]) for f in functions for found in f.device_caches.values())


def _attention(sheet: Sheet) -> dict[str, Any]:
    from fastrec.kernels.window_sparse_attention import _triton

    pattern = AttentionPattern(16)
    functions = (_triton.attention_forward, _triton.attention_short_forward)
    longest = sheet.pick(8 * LENGTHS, 40)
    rng = np.random.default_rng(0)
    lengths = rng.permutation(longest)[: sheet.pick(LENGTHS, 3)] + 1

    def call(length: int) -> None:
        q = torch.randn(1, 4, length, 32, device=sheet.device, dtype=torch.bfloat16)
        kernels.window_sparse_attention(q, q, q, pattern, backend="triton")

    for length in sheet.pick((1, 16, 17, 33, 65, 100, 129, 256, 257, 1024, longest), (1, 17)):
        call(length)
    before = held(*functions) if sheet.gpu else 0
    for length in lengths:
        call(int(length))
    if not sheet.gpu:
        return {"why": "not counted: the interpreter compiles nothing"}
    return {"compiled": held(*functions) - before, "held": before}


def _ranker(sheet: Sheet) -> dict[str, Any]:
    """A thousand pairs of a history's length and a number of candidates; graphs are captured by
    power of two, so that 1,000 lengths of up to 100 take 56 of them at most."""
    if not sheet.gpu:
        return {"why": "not counted: the interpreter compiles nothing"}
    from fastrec.runtime.cuda import launches

    ranker = model(True)
    inputs = request(ranker, 1)
    engine = fastrec.compile(ranker, inputs, "cuda", precision="bf16")
    functions = launches.KERNELS
    powers = [2**i for i in range(7)]
    for length in [*powers, LENGTH]:
        for candidates in [*powers, CANDIDATES]:
            engine(*_cut(inputs, min(length, LENGTH), min(candidates, CANDIDATES)))
    before = held(*functions)
    buckets = len(engine._executor._buckets)
    rng = np.random.default_rng(0)
    for pair in rng.permutation(LENGTH * CANDIDATES)[:LENGTHS]:
        engine(*_cut(inputs, int(pair) // CANDIDATES + 1, int(pair) % CANDIDATES + 1))
    graphs = len(engine._executor._buckets) - buckets
    return {"compiled": held(*functions) - before, "held": before, "captured": graphs}


def _cut(inputs: tuple[torch.Tensor, ...], length: int, candidates: int) -> list[Any]:
    """A shorter request: item, category and behaviour [B, L], length [B], two [B, m]."""
    history, lengths, offered = inputs[:3], inputs[3], inputs[4:]
    cut = [t[:, :length] for t in history] + [lengths.clamp(max=length)]
    return [t.contiguous().numpy() for t in [*cut, *(t[:, :candidates] for t in offered)]]
