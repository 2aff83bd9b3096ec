"""The rows of Table I and the shape of ``table1.json``.

A number is one that this run measured, or null with the reason under the same name in ``why``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastrec.errors import ArtifactError

FORMAT = "fastrec-table1"
FORMAT_VERSION = 1
VARIANTS = ("baseline", "quantized", "pruned", "pruned_quantized", "distilled")
ENGINES = ("native", "torch", "torch_compile", "onnxruntime", "openvino")
GPU_ENGINES = ("cuda", "tensorrt")
"""Asked for by name; a row without a GPU says why it is empty."""
KNOWN_ENGINES = (*ENGINES, "litert", *GPU_ENGINES)
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
PERCENTILES = ("p50", "p95", "p99")

ACCURACY = ("hit_rate_1", "hit_rate_5", "hit_rate_10", "ndcg_10", "mrr", "hit_rate_50", "ndcg_50")
RESOURCES = ("params_m", "nonzero_params_m", "size_mb", "rss_mb")
NULLABLE = (*RESOURCES, "latency_ms", "throughput_rps", *ACCURACY)
"""Row fields that are numbers of this run, or null with a reason."""


@dataclass
class Row:
    """One variant on one engine at one batch size.

    Attributes:
        variant, engine, precision, device, batch, threads: what ran.
        params_m, nonzero_params_m: millions of parameters, all and those that are not zero.
        size_mb: file bytes / 10^6 that this engine loads; rss_mb: peak resident memory of a process
            of its own that loads the engine and answers requests, in 10^6 bytes.
        latency_ms: p50, p95, p99 of one call, milliseconds.
        throughput_rps: requests (users) per second with the engine kept busy, the best of what
            ``throughput_at`` was chosen from.
        hit_rate_k, ndcg_k, mrr: in [0, 1]; ``protocol`` says on which candidates each was taken.
        ci95: metric -> [low, high]; difference: metric -> [this - baseline, low, high], paired.
        gate: how the outputs agreed with fp32 torch before any timing.
        settings: what the engine really ran, fallbacks included.
        why: field -> reason, for every field that is null.
    """

    variant: str
    engine: str
    precision: str
    batch: int
    threads: int
    device: str = "cpu"
    params_m: float | None = None
    nonzero_params_m: float | None = None
    size_mb: float | None = None
    rss_mb: float | None = None
    latency_ms: dict[str, float | None] = field(
        default_factory=lambda: dict.fromkeys(PERCENTILES, None)
    )
    calls: int = 0
    throughput_rps: float | None = None
    throughput_at: dict[str, Any] | None = None
    hit_rate_1: float | None = None
    hit_rate_5: float | None = None
    hit_rate_10: float | None = None
    ndcg_10: float | None = None
    mrr: float | None = None
    hit_rate_50: float | None = None
    ndcg_50: float | None = None
    ci95: dict[str, list[float]] = field(default_factory=dict)
    difference: dict[str, list[float]] = field(default_factory=dict)
    protocol: dict[str, str] = field(default_factory=dict)
    gate: dict[str, Any] | None = None
    settings: str = ""
    why: dict[str, str] = field(default_factory=dict)

    def is_null(self, name: str) -> bool:
        """Whether the field was not measured."""
        value = getattr(self, name)
        return value is None or (name == "latency_ms" and value["p50"] is None)

    def explain(self, names: Iterable[str], reason: str) -> None:
        """Give a reason for those of ``names`` that are null and have none yet."""
        for name in names:
            if self.is_null(name):
                self.why.setdefault(name, reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; reasons of fields that were measured after all are dropped."""
        values = dataclasses.asdict(self)
        values["why"] = {name: text for name, text in self.why.items() if self.is_null(name)}
        return values


def validate(table: Mapping[str, Any]) -> None:
    """Check a ``table1.json`` object.

    Raises:
        ArtifactError: a key is missing, a value has a wrong type, a number is negative or not
            finite, or a null has no reason; names the row and field.
    """
    if table.get("format") != FORMAT or table.get("version") != FORMAT_VERSION:
        raise ArtifactError(f"table1: not a {FORMAT} object of version {FORMAT_VERSION}")
    for key, kind in (("machine", dict), ("dataset", dict), ("rows", list)):
        if not isinstance(table.get(key), kind):
            raise ArtifactError(f"table1: {key} is not a {kind.__name__}")
    known = {f.name for f in dataclasses.fields(Row)}
    for number, row in enumerate(table["rows"]):
        where = f"table1: row {number} ({row.get('variant')}, {row.get('engine')})"
        if missing := sorted(known - set(row)):
            raise ArtifactError(f"{where}: no {', '.join(missing)}")
        for name, allowed in (
            ("variant", VARIANTS),
            ("engine", KNOWN_ENGINES),
            ("precision", PRECISIONS),
        ):
            if row[name] not in allowed:
                raise ArtifactError(f"{where}: {name} {row[name]!r} is not one of {allowed}")
        for name in NULLABLE:
            values = row[name].values() if name == "latency_ms" else [row[name]]
            if any(v is None for v in values):
                if not row["why"].get(name):
                    raise ArtifactError(f"{where}: {name} is null and `why` gives no reason")
            elif not all(_is_figure(v) for v in values):
                raise ArtifactError(f"{where}: {name} is not a finite number >= 0: {row[name]!r}")


def _is_figure(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0
