"""Grouping of rows and formats of figures, shared by all renderings of Table I."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastrec.report.paper import COLUMNS, paper_cell
from fastrec.report.schema import VARIANTS

VARIANT_TITLES = {
    "baseline": "Baseline (fp32)",
    "quantized": "Quantised (int8)",
    "pruned": "Pruned 40 %",
    "pruned_quantized": "Pruned + quantised",
    "distilled": "Distilled (bf16)",
}
ENGINE_TITLES = {
    "native": "fastrec native",
    "cuda": "fastrec CUDA",
    "torch": "torch eager",
    "torch_compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "litert": "LiteRT",
    "qnn": "QNN",
}
METRIC_TITLES = {
    "hit_rate_1": "HR@1",
    "hit_rate_5": "HR@5",
    "hit_rate_10": "HR@10",
    "ndcg_10": "NDCG@10",
    "mrr": "MRR",
    "hit_rate_50": "HR@50",
    "ndcg_50": "NDCG@50",
}
NULL = "-"

RowDict = Mapping[str, Any]


@dataclass
class Group:
    """One engine on one variant: its rows by batch size."""

    variant: str
    engine: str
    precision: str
    by_batch: dict[int, RowDict] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Engine and precision, as printed."""
        return f"{ENGINE_TITLES[self.engine]} {self.precision}"

    @property
    def any_row(self) -> RowDict:
        """A row, for the fields that do not depend on the batch."""
        return next(iter(self.by_batch.values()))

    def p(self, batch: int, percentile: str = "p50") -> float | None:
        """Latency in milliseconds, or None."""
        row = self.by_batch.get(batch)
        return None if row is None else row["latency_ms"][percentile]


def group_rows(rows: Sequence[RowDict]) -> list[Group]:
    """Groups in the order of the paper's variants, then as measured."""
    groups: dict[tuple[str, str, str], Group] = {}
    for row in rows:
        key = (row["variant"], row["engine"], row["precision"])
        groups.setdefault(key, Group(*key)).by_batch[row["batch"]] = row
    return sorted(groups.values(), key=lambda group: VARIANTS.index(group.variant))


def batches_of(rows: Sequence[RowDict]) -> list[int]:
    """Batch sizes, ascending."""
    return sorted({row["batch"] for row in rows})


def number(value: float | None) -> str:
    """Three significant digits, never in exponent form; ``-`` for None."""
    if value is None:
        return NULL
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def share(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A metric in [0, 1] with its interval: ``0.412 [0.398, 0.426]``."""
    if value is None:
        return NULL
    text = f"{value:.3f}"
    return f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else text


def signed(values: Sequence[float] | None) -> str:
    """A difference with its interval: ``-0.002 [-0.006, +0.001]``."""
    if values is None:
        return NULL
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)


def native_rows(rows: Sequence[RowDict]) -> dict[str, RowDict]:
    """variant -> the native engine's row of the smallest batch."""
    found: dict[str, RowDict] = {}
    for row in sorted(rows, key=lambda r: r["batch"]):
        if row["engine"] == "native":
            found.setdefault(row["variant"], row)
    return dict(sorted(found.items(), key=lambda pair: VARIANTS.index(pair[0])))


def reasons(rows: Sequence[RowDict]) -> dict[str, list[str]]:
    """reason -> the cells it explains, so that one reason is printed once."""
    found: dict[str, list[str]] = {}
    for group in group_rows(rows):
        for row in group.by_batch.values():
            for name, reason in row["why"].items():
                cell = f"{group.variant} / {group.title}: {name}"
                cells = found.setdefault(reason, [])
                if cell not in cells:
                    cells.append(cell)
    return found


def comparison_with_paper(rows: Sequence[RowDict]) -> list[tuple[str, str, str, str]]:
    """(variant, column, the paper's cell, ours) for every cell of the paper's Table I.

    Ours: parameters that are not zero; the native engine's one-request p50 and saturated throughput
    over those of the baseline on eager torch, which is where the paper starts; HitRate@50 over the
    catalogue, relative to the baseline's.
    """
    groups = {(g.variant, g.engine): g for g in group_rows(rows)}
    start = groups.get(("baseline", "torch"))
    first = min(batches_of(rows), default=1)
    lines = []
    for variant in VARIANTS:
        mine = groups.get((variant, "native"))
        for column in COLUMNS:
            ours = NULL if mine is None else _our_cell(column, mine, start, groups, first)
            lines.append((variant, column, paper_cell(variant, column), ours))
    return lines


def _our_cell(
    column: str,
    mine: Group,
    start: Group | None,
    groups: Mapping[tuple[str, str], Group],
    batch: int,
) -> str:
    row = mine.any_row
    if column == "parameters":
        text = number(row["params_m"])
        kept = row["nonzero_params_m"]
        return text + " M" + ("" if kept in (None, row["params_m"]) else f" ({number(kept)} kept)")
    if column == "hit rate":
        baseline = groups.get(("baseline", "native"))
        value, base = row["hit_rate_50"], baseline and baseline.any_row["hit_rate_50"]
        if value is None or not base:
            return NULL
        if mine.variant == "baseline":
            return f"{value:.3f}"
        return f"{100 * (value / base - 1):+.1f} % ({value:.3f})"
    if column == "latency":
        value, base = mine.p(batch), start and start.p(batch)
        unit, text = "ms", number(value)
    else:
        value, base = row["throughput_rps"], start and start.any_row["throughput_rps"]
        unit, text = "requests/s", number(value)
    if value is None:
        return NULL
    ratio = value / base if base else None
    if ratio is None:
        return f"{text} {unit}"
    relative = f"{100 * ratio:.0f} %" if column == "latency" else f"{ratio:.1f}x"
    return f"{text} {unit} ({relative} of eager fp32)"
