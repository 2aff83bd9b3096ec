"""The report on engines judges what was measured and says what was not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import bench_engines

MACHINE = {"cpu": "a CPU", "isa": ["avx2"], "packages": {"a": "1"}, "date": "today"}


def test_the_report_holds_every_part() -> None:
    own = {"engine": "openvino", "batch": 1, "ours_ms": 1.0, "own_ms": 0.9, "speed": 0.9}
    cell = {"precision": "int8", "batch": 8, "length": 20, "candidates": 10}
    report: dict[str, Any] = {
        "machine": MACHINE,
        "threads": 2,
        "own": [own | {"ci95": [0.8, 1.0], "goal": 0.95, "verdict": "missed"}],
        "auto": [
            cell
            | {"ms": {"native": 1.0, "torch": 3.0}, "chosen": "native", "best": "native"}
            | {"slower": 1.0, "goal": 1.03, "verdict": "reached"}
        ],
        "export": {
            "seconds": 20.0,
            "extra_mb": 200.0,
            "model_mb": 128.0,
            "extra": 1.6,
            "verdict": {"60 s": "reached", "2x": "reached"},
        },
    }
    text = bench_engines.markdown(report)
    assert "| openvino | 1 | 1.00 | 0.90 | 0.90 [0.80, 1.00] | >= 0.95: missed |" in text
    assert "| int8 | 8 | 20 | 10 | 1.00 | 3.00 | native | 0.0% | <= 3%: reached |" in text
    assert "20 s, 200 MB of extra memory (1.6 times the model)" in text


def test_parts_that_were_not_measured_are_left_out() -> None:
    text = bench_engines.markdown({"machine": MACHINE, "threads": 1})
    assert "goal" not in text
