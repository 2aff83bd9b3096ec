"""Percentiles of call times kept in fixed memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.errors import ArgumentError
from fastrec.measure.latency import LatencyHistogram


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=200), st.floats(0, 100))
@settings(max_examples=200, deadline=None)
def test_percentiles_are_within_half_a_bucket(times: list[int], q: float) -> None:
    histogram = LatencyHistogram()
    for ns in times:
        histogram.add(ns)
    wanted = sorted(times)[max(0, int(np.ceil(q / 100 * len(times))) - 1)]
    # Half a bucket of 1/64 of its lower end.
    assert histogram.percentile_ms(q) * 1e6 == pytest.approx(wanted, rel=1 / 128 + 1e-9)
    assert (histogram.count, histogram.worst_ns) == (len(times), max(times))


def test_it_does_not_grow_with_the_calls() -> None:
    histogram = LatencyHistogram()
    size = len(histogram._counts)
    for ns in (0, 1, 2**63 - 1, *range(0, 10**6, 97)):
        histogram.add(ns)
    assert len(histogram._counts) == size
    assert histogram.worst_ns == 2**63 - 1


def test_nothing_counted_has_no_percentile() -> None:
    with pytest.raises(ArgumentError, match="empty"):
        LatencyHistogram().percentile_ms(50)
    histogram = LatencyHistogram()
    histogram.add(5)
    with pytest.raises(ArgumentError, match="q"):
        histogram.percentile_ms(101)
