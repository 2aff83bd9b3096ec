"""The recorder's counts in Prometheus' text format. Base units; the labels are bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from fastrec import __version__
from fastrec.serving.core.inference_core import InferenceCore
from fastrec.serving.observe.recorder import Histogram, Recorder
from fastrec.serving.wire.request_handler import RequestHandler

STATES = ("LOADING", "WARMING", "READY", "EJECTED", "DRAINING", "FAILED")


class Metrics:
    """A collector over a recorder; built when it is scraped, so requests pay nothing for it."""

    def __init__(self, recorder: Recorder, core: InferenceCore, handler: RequestHandler) -> None:
        self._recorder, self._core, self._handler = recorder, core, handler
        self.loop_lag_s = 0.0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, for an Accept header."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        r = self._recorder
        yield _histogram(
            "fastrec_request_duration_seconds",
            "From arrival to answer; outcome is ok or why there was none.",
            ("model", "version", "tier", "lane", "outcome"),
            r.requests,
        )
        yield _histogram(
            "fastrec_queue_duration_seconds", "Waiting for an engine.", ("model", "lane"), r.queue
        )
        batch = ("model", "version", "lane")
        yield _histogram("fastrec_batch_duration_seconds", "Engine calls.", batch, r.batches)
        yield _histogram(
            "fastrec_batch_rows", "Users x candidates of engine calls.", batch, r.batch_rows
        )
        yield _counter(
            "fastrec_engine_errors",
            "Engine calls that failed.",
            ("model", "version"),
            r.engine_errors,
        )
        yield _counter(
            "fastrec_screen_audits",
            "Screened calls that were scored whole too.",
            ("model", "version"),
            {key: audits for key, (audits, _) in r.screens.items()},
        )
        screens = GaugeMetricFamily(
            "fastrec_screen_recall_ratio",
            "Share of the best candidates that the screen kept, over all audits.",
            labels=("model", "version"),
        )
        for key, (audits, total) in list(r.screens.items()):
            screens.add_metric(key, total / audits)
        yield screens
        yield _counter(
            "fastrec_rollout_actions", "Steps of grey releases.", ("model", "action"), r.rollouts
        )
        states = GaugeMetricFamily(
            "fastrec_engines", "Engines by state.", labels=("model", "version", "state")
        )
        for info in self._core.models():
            for state in STATES:
                states.add_metric((info.name, info.version, state), info.engines.get(state, 0))
        yield states
        weights = GaugeMetricFamily(
            "fastrec_rollout_weight_ratio",
            "Share of requests that name no version.",
            labels=("model", "version"),
        )
        ready = GaugeMetricFamily("fastrec_model_ready", "1 or 0.", labels=("model", "version"))
        for info in self._core.models():
            weights.add_metric((info.name, info.version), info.weight)
            up = self._core.ready(info.name, info.version)
            ready.add_metric((info.name, info.version), float(up))
        yield weights
        yield ready
        for name, text, value in (
            ("fastrec_concurrency_limit_seconds", "Engine time that may be in flight.", r.limit_s),
            ("fastrec_guard_ratio", "What the system guard leaves of the limit.", r.guard),
            ("fastrec_event_loop_lag_seconds", "How late timers run.", self.loop_lag_s),
            ("fastrec_queued_requests", "Requests waiting for an engine.", self.queued()),
            ("fastrec_open_requests", "Requests not answered yet.", self._handler.running),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield InfoMetricFamily("fastrec_build", "Versions.", value={"version": __version__})

    def queued(self) -> float:
        """Requests that wait for an engine."""
        return _sum(self._core.stats(), "queued")


def _histogram(
    name: str, text: str, labels: Iterable[str], series: Mapping[Any, Histogram]
) -> Metric:
    family = HistogramMetricFamily(name, text, labels=tuple(labels))
    for key, histogram in list(series.items()):
        total, buckets = 0, []
        edges = [*(f"{edge:g}" for edge in histogram.edges), "+Inf"]
        for edge, count in zip(edges, histogram.counts, strict=True):
            total += count
            buckets.append((edge, total))
        family.add_metric(key, buckets, histogram.total)
    return family


def _counter(name: str, text: str, labels: Iterable[str], series: Mapping[Any, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=tuple(labels))
    for key, count in list(series.items()):
        family.add_metric(key, count)
    return family


def _sum(stats: Mapping[str, Any], key: str) -> float:
    """The sum of a number that a snapshot holds at its top, or once a model."""
    if isinstance(stats.get(key), int | float):
        return float(stats[key])
    return sum((_sum(v, key) for v in stats.values() if isinstance(v, Mapping)), 0.0)
