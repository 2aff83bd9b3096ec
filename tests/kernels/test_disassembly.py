"""The innermost hot loops keep their sums in registers.

gcc may spill accumulators into the loop, which runs three times slower yet stays correct.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest

from fastrec.kernels._compiled import native, reason_missing

pytestmark = [
    pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing())),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is missing"),
]


@dataclass(frozen=True)
class HotLoop:
    """A function by its C++ name, the instruction it exists for, and how many its loop holds.

    Numbers that the name's groups capture (rows, registers) are multiplied with ``at_least``.
    """

    function: str
    instruction: str
    functions: int  # that many must be found, so that a rename does not pass unseen
    at_least: int = 1
    straight: bool = False  # unrolled as a whole: all of the function is looked at


FMA = r"vfmadd\d+ps"
LINEAR = r"sparse_int8_linear::.*accumulate<%s, fastrec::sparse_int8_linear::.*::%s>\("
HOT_LOOPS = [
    *(
        HotLoop(LINEAR % ("(?:1|2)", isa), dot, 2, 8)  # several sets of sums
        for isa, dot in (
            ("Avx512Vnni", "vpdpbusd"),
            ("AvxVnni", "vpdpbusd"),
            ("Avx512", "vpmaddwd"),
        )
    ),
    HotLoop(LINEAR % ("(?:1|2)", "Avx2"), "vpmaddwd", 2, 4),
    *(
        HotLoop(LINEAR % (r"([3-9]|1\d)", isa), dot, rows - 2, 2)
        for isa, dot, rows in (
            ("Avx512Vnni", "vpdpbusd", 12),
            ("AvxVnni", "vpdpbusd", 6),
            ("Avx512", "vpmaddwd", 12),
            ("Avx2", "vpmaddwd", 6),
        )
    ),
    HotLoop(r"padded_attention::.*scores<(\d+), (\d+)>\(", FMA, 8 * 3 + 6),
    HotLoop(r"padded_attention::.*weighted_sum<(\d+), (\d+), true>\(", FMA, 8 + 6),
    HotLoop(r"padded_attention::.*weighted_sum<(\d+), 1, false>\(", FMA, 8 + 5),
    HotLoop(r"pointwise_attention::.*key_scores<(\d+)>\(", FMA, 4),
    HotLoop(r"pointwise_attention::.*weighted_sum<([48]), (\d+), (?:true|false)>\(", FMA, 8),
    HotLoop(r"pointwise_attention::.*activate(?:_and_derive)?\(", rf"{FMA} .*%zmm", 2, 12),
    HotLoop(r"pointwise_attention_int8::.*products<(?:true|false)>\(", "vpdpbusd", 2, 16),
    HotLoop(r"pointwise_attention_int8::.*products<(?:true|false)>\(", "vpmaddwd", 2, 8),
    HotLoop(r"window_sparse_attention::.*near_scores<(\d+)>\(", FMA, 6),
    HotLoop(
        r"window_sparse_attention::.*far_scores<[124], ", "vmulps|vfmadd", 18, 16, straight=True
    ),
    HotLoop(r"window_sparse_attention::.*weighted_sum<(\d+), (?:true|false), ", FMA, 18, 8),
    HotLoop(r"window_sparse_attention_int8::.*near_scores\(", "vpmaddwd", 1, 8),
    HotLoop(r"window_sparse_attention_int8::.*tile_scores<(\d+)>\(", "vpdpbusd", 4),
    HotLoop(r"window_sparse_attention_int8::.*weighted_sums\(", "vpmaddwd", 1, 8),
    HotLoop(r"window_sparse_attention_int8::.*weighted_sums\(", "vpdpbusd", 1, 32),
    HotLoop(r"attention_map_kl::.*near_scores<(\d+)>\(", FMA, 4),
    HotLoop(r"attention_map_kl::.*far_scores\(", FMA, 2, 4),
    HotLoop(r"attention_map_kl::.*query_gradients\(", FMA, 2, 8),
    HotLoop(
        r"grouped_linear::.*(?:tile|outer|pair)_product<(\d+)(?:, (\d+))?>\(",
        rf"{FMA}|vdpbf16ps",
        3 * 24 + 2 * 6,
    ),
    HotLoop(r"grouped_linear::.*dot_rows<(?:float|unsigned short), (\d+)>\(", FMA, 6, 4),
    HotLoop(r"separable_projection::.*(?:convolve|correlate)_block<(\d+)>\(", FMA, 2 * (12 + 6)),
]


@functools.cache
def functions() -> dict[str, list[list[str]]]:
    """Instructions by demangled name; anonymous namespaces give several of one name."""
    text = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", native().__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, list[list[str]]] = {}
    for name, body in re.findall(r"^[0-9a-f]+ <([^\n]*)>:\n(.*?)\n\n", text + "\n\n", re.M | re.S):
        found.setdefault(name, []).append(body.splitlines())
    return found


def loops(lines: list[str]) -> list[list[str]]:
    """Every stretch of code between a jump back and its target, the shortest first."""
    at = {}
    for i, line in enumerate(lines):
        if match := re.match(r"\s*([0-9a-f]+):", line):
            at[int(match[1], 16)] = i
    found = []
    for i, line in enumerate(lines):
        match = re.search(r"\sj\w+\s+([0-9a-f]+)\b", line)
        if match and (target := at.get(int(match[1], 16), i + 1)) <= i:
            found.append(lines[target : i + 1])
    return sorted(found, key=len)


def spills(lines: list[str], loop: list[str]) -> list[str]:
    """Instructions of the loop that read or write the stack frame."""
    # rbp is a register like any other unless the function makes it the frame's.
    framed = any(re.search(r"mov\s+%rsp,%rbp", line) for line in lines)
    register = r"\(%r(sp|bp)" if framed else r"\(%rsp"
    return [line for line in loop if re.search(register, line) and not re.search(r"\slea\s", line)]


@pytest.mark.parametrize("hot", HOT_LOOPS, ids=lambda hot: f"{hot.function} {hot.instruction}")
def test_hot_loops_touch_no_stack(hot: HotLoop) -> None:
    bodies = [
        (match, lines)
        for name, variants in functions().items()
        if (match := re.search(hot.function, name))
        for lines in variants
        if any(re.search(hot.instruction, line) for line in lines)
    ]
    assert len(bodies) == hot.functions, [match.string for match, _ in bodies]
    for match, lines in bodies:
        name = match.string
        wanted = hot.at_least * math.prod(int(number) for number in match.groups() if number)
        innermost = next(
            (
                loop
                for loop in ([lines] if hot.straight else loops(lines))
                if sum(bool(re.search(hot.instruction, line)) for line in loop) >= wanted
            ),
            None,
        )
        assert innermost is not None, f"{name}: nothing with {wanted} x {hot.instruction}"
        assert not spills(lines, innermost), name


def test_a_spill_would_be_seen() -> None:
    code = [
        "  10:\tvmovaps %zmm1,0x40(%rsp)",
        "  20:\tvpdpbusd (%rax),%zmm0,%zmm1",
        "  28:\tvmovaps 0x40(%rsp),%zmm2",
        "  30:\tjne    20 <accumulate+0x10>",
        "  38:\tjmp    10 <accumulate>",
    ]
    inner, outer = loops(code)
    assert (len(inner), len(outer)) == (3, 5)
    assert spills(code, inner) == code[2:3]
    assert not spills(["  1:\tmov (%rbp,%rax,4),%ecx"], ["  1:\tmov (%rbp,%rax,4),%ecx"])
