"""Made-up reports for the rendering tests: the figures mean nothing."""

from __future__ import annotations

from typing import Any

from fastrec.report.paper import paper_table
from fastrec.report.schema import ACCURACY, FORMAT, FORMAT_VERSION, NULLABLE, VARIANTS, Row

_ENGINES = {
    "fp32": ("native", "torch", "torch_compile", "onnxruntime", "openvino"),
    "int8": ("native", "torch", "onnxruntime", "openvino"),
    "bf16": ("native", "torch", "openvino"),
}
_PRECISION = dict(zip(VARIANTS, ("fp32", "int8", "fp32", "int8", "bf16"), strict=True))


def made_up_row(variant: str, engine: str, precision: str, batch: int, p50: float) -> Row:
    row = Row(variant, engine, precision, batch, 2, settings=f"{engine} settings <{precision}>")
    row.latency_ms = {"p50": p50, "p95": p50 * 1.2, "p99": p50 * 1.7}
    row.throughput_rps = 900 / p50
    row.params_m, row.nonzero_params_m, row.size_mb, row.rss_mb = 32.0, 24.5, 33.1, 410.0
    for i, name in enumerate(ACCURACY):
        setattr(row, name, 0.3 + 0.05 * i)
        row.ci95[name] = [0.28 + 0.05 * i, 0.32 + 0.05 * i]
        row.protocol[name] = "candidates (made up)"
        if variant != "baseline":
            row.difference[name] = [-0.001, -0.004, 0.002]
    return row


def made_up_report() -> dict[str, Any]:
    rows = []
    for v, variant in enumerate(VARIANTS):
        precision = _PRECISION[variant]
        for e, engine in enumerate(_ENGINES[precision]):
            for batch in (1, 8):
                row = made_up_row(variant, engine, precision, batch, batch * (1 + e) / (1 + v))
                rows.append(row)
    failed = Row("pruned", "openvino", "bf16", 1, 2, settings="openvino")
    failed.explain(NULLABLE, "it crashed: <boom>")
    rows.append(failed)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "summary": "Made-up figures for a test.",
        "machine": {"cpu": "a test CPU", "cores": 2},
        "dataset": {"name": "made up", "users": 10},
        "run": {"seconds": {"train": 1.5}},
        "paper": paper_table(),
        "ratios": [
            {
                "variant": "pruned_quantized",
                "batch": 1,
                "rival": "OpenVINO int8",
                "native_ms": 0.5,
                "rival_ms": 1.0,
                "ratio": 0.5,
                "ci95": [0.48, 0.52],
                "why": None,
            },
            {"variant": "quantized", "batch": 1, "ratio": None, "why": "no rival was timed"},
        ],
        "rows": [row.to_dict() for row in rows],
    }
