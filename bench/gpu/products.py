"""``sparse_int8_linear`` beside cuBLASLt's INT8 and cuSPARSELt's 2:4; grouped products beside bmm.

Results of 4 bytes on both sides (our float32 after scale and bias, their int32 before), so that
both write as much.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fastrec import kernels
from fastrec.kernels.sparse_int8_linear.packed import PackedWeight
from gpu.sheet import Contender, Sheet, Work
from gpu.timing import Call

SCALE, ZERO = 0.02, 128


def measure(sheet: Sheet) -> None:
    """The goals' products, one a comparison."""
    for density in (1.0, 0.5, 0.25):
        _linear(sheet, 3200, 1024, density)
    _linear(sheet, 4096, 4096, 0.5, two_four=True)
    _grouped(sheet)


def weight_of(outputs: int, inputs: int, density: float, two_four: bool) -> torch.Tensor:
    """int8 [N, K] on the CPU: dense, blocks of 32 x 4 kept, or 2 of every 4 inputs."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    weight = torch.randint(1, 128, (outputs, inputs), generator=generator)
    weight *= torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
    if two_four:
        order = torch.rand(outputs, inputs // 4, 4, generator=generator).argsort(-1)
        kept = (order < 2).view(outputs, inputs)
    else:
        blocks = torch.rand(outputs // 32, inputs // 4, generator=generator).argsort(1)
        kept = (blocks < round(density * (inputs // 4))).repeat_interleave(32, 0)
        kept = kept.repeat_interleave(4, 1)
    return (weight * kept).to(torch.int8)


def _linear(sheet: Sheet, m: int, k: int, density: float, two_four: bool = False) -> None:
    kind = "2:4" if two_four else f"density {density:g}"
    what = f"int8 linear M={m} K=N={k}, {kind}"
    rows, size = sheet.pick((m, k), (70, 128))
    weight = weight_of(size, size, density, two_four)
    packed = PackedWeight.pack(weight, torch.full((size,), 0.01)).to(sheet.device)
    weight = weight.to(sheet.device)
    # Without the zeros of a pattern that skips them; a rival multiplies them.
    work = Work(m * k + 4 * m * k + round(k * k * density), round(m * k * k * density), "int8")

    def inputs() -> tuple[torch.Tensor]:
        return (torch.randint(0, 256, (rows, size), dtype=torch.uint8, device=sheet.device),)

    def exact(x: torch.Tensor, zero: int = ZERO) -> torch.Tensor:
        return (x.double() - zero) @ weight.double().t()

    def expected(x: torch.Tensor) -> torch.Tensor:
        # As the kernel rounds: the exact sum to float32, then one product.
        scale = torch.tensor(SCALE) * torch.tensor(0.01)
        return exact(x).float() * scale

    def ours(backend: str | None, out: str | None = None) -> Contender:
        epilogue: dict[str, Any] = {"x_scale": SCALE, "x_zero_point": ZERO, "backend": backend}
        if out is not None:
            epilogue |= {"out": out, "out_scale": 1.0, "out_zero_point": 128}

        def prepare(x: torch.Tensor) -> Call:
            return lambda: kernels.sparse_int8_linear(x, packed, **epilogue)

        if out is None:
            return Contender(prepare, check=_equal)
        codes = lambda x: (expected(x).clamp(-128, 127).round() + 128).to(torch.uint8)  # noqa: E731
        return Contender(prepare, codes, check=_equal, note="uint8 out, as in a tower")

    contenders = {
        "fastrec, CUDA C++": ours("cuda"),
        "fastrec, Triton": ours("triton"),
        "fastrec, CUDA C++, uint8 out": ours("cuda", "uint8"),
    }
    if not sheet.gpu:
        contenders["fastrec, CPU"] = ours("cpu")
    signed = functools.partial(_signed, weight=weight)

    def products(x: torch.Tensor) -> torch.Tensor:
        return exact(x, 128).to(torch.int32)

    contenders["torch._int_mm"] = Contender(signed, products, check=_equal)
    if two_four:
        two = functools.partial(_cusparselt, weight=weight)
        contenders["cuSPARSELt 2:4"] = Contender(two, products, check=_equal)
    sheet.compare(what, work, inputs, contenders, expected)


def _equal(actual: torch.Tensor, expected: torch.Tensor) -> str | None:
    return None if torch.equal(actual, expected) else "not bit-exact"


def _signed(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """cuBLASLt's: signed by signed."""
    signed = (x ^ 128).view(torch.int8)
    return lambda: torch._int_mm(signed, weight.t())


@functools.cache
def _compressed(weight: torch.Tensor) -> torch.Tensor:
    return torch._cslt_compress(weight)


@functools.cache
def _algorithm(weight: torch.Tensor, rows: int) -> int:
    """cuSPARSELt's own search for the fastest."""
    x = torch.zeros(rows, weight.shape[1], dtype=torch.int8, device=weight.device)
    found = torch._cslt_sparse_mm_search(
        _compressed(weight), x.t(), out_dtype=torch.int32, transpose_result=True
    )
    return int(found[0] if isinstance(found, tuple) else found)


def _cusparselt(x: torch.Tensor, weight: torch.Tensor) -> Call:
    signed, packed = (x ^ 128).view(torch.int8), _compressed(weight)
    options = {"out_dtype": torch.int32, "transpose_result": True}
    options["alg_id"] = _algorithm(weight, len(x))
    return lambda: torch._cslt_sparse_mm(packed, signed.t(), **options)


def _grouped(sheet: Sheet) -> None:
    m, groups, width = 6400, 4, 64
    rows = sheet.pick(m, 48)
    weight = torch.randn(groups, width, width, device=sheet.device, dtype=torch.bfloat16) / 8
    work = Work(4 * m * groups * width, m * groups * width * width, "bf16")

    def inputs() -> tuple[torch.Tensor]:
        shape = (rows, groups * width)
        return (torch.randn(shape, device=sheet.device, dtype=torch.bfloat16),)

    def expected(x: torch.Tensor) -> torch.Tensor:
        parts = x.float().view(rows, groups, width)
        return torch.einsum("mgk,gnk->mgn", parts, weight.float()).reshape(rows, groups * width)

    def ours(x: torch.Tensor) -> Call:
        return lambda: kernels.grouped_linear(x, weight, backend="triton")

    def bmm(x: torch.Tensor) -> Call:
        apart = x.view(rows, groups, width).transpose(0, 1)
        return lambda: torch.bmm(apart, weight.mT).transpose(0, 1).reshape(rows, groups * width)

    contenders = {"fastrec, Triton": Contender(ours), "torch.bmm": Contender(bmm)}
    sheet.compare(
        f"grouped linear M={m}, {groups} x 64 x 64, bf16", work, inputs, contenders, expected
    )
