"""The benchmark of other people's models: its rankers run, its report says what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import bench_models
from rankers import MODELS

MACHINE = {"cpu": "a CPU", "isa": ["avx2"], "cores_usable": 2, "packages": {"a": "1"}}
ROW: dict[str, Any] = {
    "ms": {"native": 0.5, "openvino": 1.0},
    "errors": {"native": 3e-7},
    "refused": {"native int8": "no INT8 layer"},
    "compile_s": 2.0,
    "native": {"than": "openvino", "x": 2.0, "ci95": [1.9, 2.1]},
}


@pytest.mark.parametrize("name", MODELS)
def test_each_ranker_scores_each_user_alone(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name].build().eval(), MODELS[name].inputs(3, 1)
    with torch.inference_mode():
        scores = model(*inputs)
        first = model(*(tensor[:1] for tensor in inputs))
    assert scores.shape[0] == 3
    assert scores.isfinite().all()
    torch.testing.assert_close(scores[:1], first, rtol=1e-4, atol=1e-4)


def test_the_report_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    report = {"machine": MACHINE | {"date": "today"}, "rows": {"DIN": {"1": {"1": ROW}}}}
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench_models.BEGIN}\nold\n{bench_models.END}\nafter\n")
    bench_models.written(page, bench_models.summary(report))
    text = page.read_text()
    assert "| DIN | 3e-07 | 2.00x | - | - | - | - | - |" in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    bench_models.written(tmp_path / "new.md", bench_models.markdown(report))
    text = (tmp_path / "new.md").read_text()
    assert "| DIN | 1 | 1 | 0.500 | 2.00x [1.90, 2.10] | openvino |" in text
    assert "no INT8 layer" in text
    assert "1 of 1" in text
