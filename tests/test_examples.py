"""The examples compile into one plan and agree with torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import fastrec
from fastrec.kernels._compiled import reason_missing

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))
EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["PlainBst", "PlainSasrec"])
def test_example(name: str, precision: str) -> None:
    torch.manual_seed(3)
    module = loaded({"PlainBst": "plain_bst", "PlainSasrec": "plain_sasrec"}[name])
    model = getattr(module, name)().eval()
    inputs = module.example_inputs()
    if precision == "int8":
        fastrec.quantize_(model, fastrec.Int8(), calibration=[inputs])
    engine = fastrec.compile(model, inputs, backend="native", settings={"executor": "plan"})
    for batch in (1, 2, 17):
        other = module.example_inputs(batch)
        with torch.inference_mode():
            expected = model(*other)
        # A float's last bit may turn the rounding of an int8 layer's input, by one step of 255.
        limit = (2e-2 if precision == "int8" else 1e-4) * float(expected.abs().max())
        assert float((engine(*other) - expected).abs().max()) <= limit


@pytest.mark.parametrize("name", ["PlainDin", "PlainHstu"])
def test_accelerated_example(name: str) -> None:
    torch.manual_seed(4)
    module = loaded({"PlainDin": "plain_din", "PlainHstu": "plain_hstu"}[name])
    model = getattr(module, name)().eval()
    inputs = module.example_inputs(16)
    with torch.inference_mode():
        before = model(*inputs)
    report = module.accelerate(model)
    assert report.tables == ["items"]
    assert len(report.layers) >= 4
    # All that is left alone is listed; here nothing is.
    assert report.left == {}
    engine = fastrec.compile(model, inputs, backend="native")
    with torch.inference_mode():
        after = model(*inputs)
    assert float((engine(*inputs) - after).abs().max()) <= 2e-2 * float(after.abs().max())
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(before, after)
