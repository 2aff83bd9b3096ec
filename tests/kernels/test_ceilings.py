"""The measured limits of the machine: plausible, and safe on any argument."""

from __future__ import annotations

import pytest

from fastrec.kernels._compiled import native, reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


@pytest.mark.parametrize("buffer_bytes", [1, 4096, 5000, 1 << 20])
def test_some_bytes_are_read(buffer_bytes: int) -> None:
    assert 0 < native().read_bandwidth_gbs(buffer_bytes, 0.01) < 100_000


@pytest.mark.parametrize("buffer_bytes", [0, -1, 1 << 60])
def test_a_buffer_that_can_not_be_has_no_bandwidth(buffer_bytes: int) -> None:
    assert native().read_bandwidth_gbs(buffer_bytes, 0.01) == 0


def test_the_peak_is_known_exactly_where_the_instruction_is() -> None:
    assert (native().vpdpbusd_peak_gops(0.01) > 0) == native().machine_has("avx512vnni")
