"""Detection as a pure function of the CPUID words, and forcing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastrec import kernels
from fastrec.errors import IsaError
from fastrec.kernels._compiled import native, reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

OSXSAVE, FMA, AVX, F16C = 1 << 27, 1 << 12, 1 << 28, 1 << 29
AVX512_EBX = 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31
VNNI = 1 << 11
BF16 = 1 << 5
FULL = {
    "max_leaf": 7,
    "leaf1_ecx": OSXSAVE | FMA | AVX | F16C,
    "leaf7_ebx": AVX512_EBX,
    "leaf7_ecx": VNNI,
    "leaf7_1_eax": BF16,
    "xcr0": 0xE7,
}
TARGET = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,avx512vnni,avx512bf16"


def test_a_full_machine_is_supported() -> None:
    assert native().isa_target("avx512bf16") == TARGET
    assert native().supports(target=TARGET, **FULL)
    assert native().supports(target="", **dict.fromkeys(FULL, 0))


@pytest.mark.parametrize(
    "lacking",
    [
        {"leaf1_ecx": FMA | AVX | F16C},  # no OSXSAVE
        {"xcr0": 0x7},  # the system saves AVX state, not AVX-512's
        {"xcr0": 0x67},  # ... not ZMM16-31
        {"xcr0": 0xE1},  # ... not AVX's
        {"max_leaf": 6},
        {"leaf7_ecx": 0},
        {"leaf7_1_eax": 0},
        *({"leaf7_ebx": AVX512_EBX & ~(1 << bit)} for bit in (16, 17, 30, 31)),
        {"leaf1_ecx": OSXSAVE | AVX | F16C},  # no FMA
        {"leaf1_ecx": OSXSAVE | FMA | AVX},  # no F16C
    ],
)
def test_any_missing_bit_rules_it_out(lacking: dict[str, int]) -> None:
    assert not native().supports(target=TARGET, **(FULL | lacking))


def test_an_unknown_feature_is_never_supported() -> None:
    assert not native().supports(target="avx512f,warp9", **FULL)


@pytest.mark.parametrize("name", kernels.isa_names() if reason_missing() is None else [])
def test_every_word_of_every_target_is_known(name: str) -> None:
    # All bits set: what is still unsupported is a word that the feature table does not know.
    everything = dict.fromkeys(FULL, 2**32 - 1)
    assert native().supports(target=native().isa_target(name), **everything)


def test_this_machine_agrees_with_its_words() -> None:
    words = native().cpu_words()
    for name in kernels.isa_names():
        target = native().isa_target(name)
        assert native().machine_has(name) == native().supports(target=target, **words)


def test_forcing_holds_inside_the_block_only() -> None:
    before = kernels.active_isa()
    spec = kernels.registry()["sparse_int8_linear"]
    with kernels.force_isa("scalar"):
        assert kernels.active_isa() == spec.kernel_isa() == "scalar"
    assert kernels.active_isa() == before


def test_forcing_an_unknown_isa_raises() -> None:
    with (
        pytest.raises(IsaError, match=r"expected one of scalar.*got 'sse9'"),
        kernels.force_isa("sse9"),
    ):
        pass


def test_forcing_by_environment() -> None:
    def active(value: str) -> subprocess.CompletedProcess[str]:
        code = "from fastrec import kernels; print(kernels.active_isa())"
        return subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"FASTREC_FORCE_ISA": value},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    assert active("scalar").stdout.strip() == "scalar"
    assert active("").stdout.strip() == kernels.active_isa()
    unknown = active("doesnotexist")
    assert unknown.returncode != 0
    assert "IsaError" in unknown.stderr
