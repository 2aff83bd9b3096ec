"""``make gpu-report`` without a GPU runs to its end and says that nothing was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_report.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: nothing is left empty")
def test_the_dry_run_leaves_empty_cells_beside_bounds(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed (fastrec[cuda])")
    run = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, "--seconds", "600", "--no-tests"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert report["gpu"] is None
    assert len(report["rows"]) == 6
    for row in report["rows"]:
        assert "device_us" not in row
        assert row["h200_bound_us"] > 0
        assert row["launches"] == 5
        assert "no CUDA device" in row["why"]
    assert (tmp_path / "gpu_report.md").read_text().startswith("# No GPU")
