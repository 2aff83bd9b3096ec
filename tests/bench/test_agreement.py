"""The engine computes the integers of the converted model; the ranking is the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrec.kernels._compiled import reason_missing
from fastrec.models import Ranker, RankerConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import bench_agreement
import bench_ranker

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

CONFIG = RankerConfig(
    n_items=2000, n_categories=50, history_length=40, d=64, ffn=96, tower=(96, 64, 33)
)


@pytest.mark.parametrize(
    ("sparsity", "attention"),
    [(None, False), (0.0, False), (0.4, False), (0.4, True), (0.75, False)],
)
def test_the_engine_ranks_as_the_converted_model(sparsity: float | None, attention: bool) -> None:
    torch.manual_seed(3)
    model = bench_ranker.variant(Ranker(CONFIG).eval(), sparsity, attention)
    row = bench_agreement.compare(model, threads=2, requests=200, integers=100, exact=50)
    assert row["top_10_same"] == 1
    assert row["rms_error"] <= 2 * row["rms_error_torch"]
    if sparsity is not None:
        assert row["integers_same"] == 1


def test_the_report_judges_what_was_compared() -> None:
    row: dict[str, Any] = {
        "variant": "dense int8",
        "requests": 10,
        "top_10_same": 0.9,
        "largest_difference": 1e-3,
        "rms_error": 1e-6,
        "rms_error_torch": 1e-6,
        "integers_same": 1.0,
        "integer_requests": 10,
    }
    machine = {"cpu": "a CPU", "commit": None}
    text = bench_agreement.markdown({"machine": machine, "threads": 2, "rows": [row]})
    assert ">= 99.9%: missed" in text
    assert "<= 2: reached" in text
    assert "100.00% of 10" in text
