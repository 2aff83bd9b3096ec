"""Requests as OpenTelemetry spans: ``ModelInfer`` > admission, queue, engine; and the batch.

Spans are made when a request has ended, from times that the core keeps anyway, so a request
that is not traced costs one look at its outcome, and one that was refused or slow can be kept at
any sampling rate. The parent comes from the caller's metadata or headers (W3C's
``traceparent``, or what OTEL_PROPAGATORS names).

| span | from, to |
|---|---|
| ``ModelInfer`` | the decoded request, its answer |
| ``admission`` | the decoded request, until the scheduler took it, or refused it |
| ``queue`` | until the start of the (last) engine call that held a part of it |
| ``engine`` | that call; linked to its ``batch`` |
| ``batch`` | once a call, in the trace of its first traced member, linked to the others |
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastrec.errors import ArgumentError, MissingDependencyError
from fastrec.serving.core.events import BatchDone, EngineChanged, Event
from fastrec.serving.core.request import Kind, Rejected, Request, Response

try:
    from opentelemetry import propagate, trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import (
        Decision,
        ParentBased,
        Sampler,
        SamplingResult,
        TraceIdRatioBased,
    )
except ImportError as error:
    if (error.name or "").partition(".")[0] != "opentelemetry":
        raise
    raise MissingDependencyError("opentelemetry-sdk", "otel", "tracing") from error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastrec.serving.core.inference_core import InferenceCore

_OUTCOME, _SLOW = "fastrec.outcome", "fastrec.slow"
# Refusals that come before anything is queued; the others have waited.
_BEFORE_QUEUE = frozenset(set(Kind) - {Kind.EXPIRED, Kind.CANCELLED, Kind.INTERNAL})


class Traces:
    """Makes the spans of a server's requests.

    Args:
        provider: where spans go; see :func:`over_otlp`.
        core: whose requests they are.
    """

    def __init__(self, provider: trace.TracerProvider, core: InferenceCore) -> None:
        self.tracer = provider.get_tracer("fastrec.serving")
        self.core = core
        self.goals_s = {tier: core.config.latency_s(tier) for tier in core.config.tiers}
        # By engine, the call that ended last: a member's task runs before the engine's next call.
        self.batches: dict[str, _Batch] = {}
        core.subscribe(self)

    def on_event(self, event: Event) -> None:
        """Keep the last call of each engine."""
        if isinstance(event, BatchDone):
            self.batches[event.engine] = _Batch(event)
        elif isinstance(event, EngineChanged) and event.new == "CLOSED":
            self.batches.pop(event.engine, None)

    def begin(self, headers: Iterable[tuple[str, Any]]) -> OpenTrace:
        """Start the trace of a request.

        Args:
            headers: (name, value) pairs of gRPC metadata or HTTP headers, names in lower case.
        """
        return OpenTrace(self, time.time_ns(), headers)

    def root(
        self, opened: OpenTrace, request: Request, version: str, outcome: str, slow: bool
    ) -> trace.Span:
        """Start the span of a whole request.

        Args:
            opened: its trace.
            request: what was asked.
            version: of the model that answered, or was asked for.
            outcome: ``ok`` or a refusal's kind.
            slow: whether it missed its tier's goal.
        """
        attributes: dict[str, str | int | bool] = {
            "rpc.method": "ModelInfer",
            "fastrec.model": request.model,
            "fastrec.version": version,
            "fastrec.tier": request.tier or self.core.config.default_tier,
            "fastrec.priority": request.priority,
            "fastrec.request_id": request.id,
            _OUTCOME: outcome,
            _SLOW: slow,
        }
        return self.tracer.start_span(
            "ModelInfer",
            context=opened.context(),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=opened.start_ns,
        )

    def child(
        self,
        name: str,
        within: Context,
        start: int,
        end: int,
        links: Sequence[trace.Link] = (),
        **attributes: str | int,
    ) -> None:
        """Record a part of a request.

        Args:
            name: of the span.
            within: the parent's context.
            start, end: nanoseconds since 1970.
            links: to other spans.
            attributes: without the prefix ``fastrec.``.
        """
        named = {f"fastrec.{key}": value for key, value in attributes.items()}
        span = self.tracer.start_span(name, within, links=links, attributes=named, start_time=start)
        span.end(end)


class OpenTrace:
    """The trace of a request that is not answered yet."""

    __slots__ = ("_headers", "_traces", "start_ns")

    def __init__(self, traces: Traces, start_ns: int, headers: Iterable[tuple[str, Any]]) -> None:
        self._traces, self.start_ns, self._headers = traces, start_ns, headers

    def context(self) -> Context:
        """The caller's trace context, or an empty one."""
        carrier = {k: v for k, v in self._headers if isinstance(v, str)}
        return propagate.extract(carrier, Context())

    def answered(self, request: Request, response: Response) -> None:
        """Record the spans of an answered request."""
        traces, end = self._traces, time.time_ns()
        times = response.timings
        tier = request.tier or traces.core.config.default_tier
        slow = times.total_s > traces.goals_s.get(tier, float("inf"))
        root = traces.root(self, request, response.version, "ok", slow)
        if root.is_recording():
            root.set_attribute("fastrec.parts", times.parts)
            root.set_attribute("fastrec.tries", times.tries)
            within = trace.set_span_in_context(root)
            arrival = max(end - _ns(times.total_s), self.start_ns)
            started = min(arrival + _ns(times.queue_s), end)
            done = min(started + _ns(times.compute_s), end)
            traces.child("admission", within, self.start_ns, arrival)
            traces.child("queue", within, arrival, started)
            batch = traces.batches.get(times.engine)
            links = []
            if batch is not None:
                links.append(trace.Link(batch.joined(traces.tracer, root, within, started, done)))
            traces.child(
                "engine", within, started, done, links=links, engine=times.engine,
                batch_rows=times.batch_rows,
            )  # fmt: skip
        root.end(end)

    def failed(self, request: Request, error: BaseException) -> None:
        """Record the spans of a request that was refused, failed or was cancelled."""
        traces, end = self._traces, time.time_ns()
        kind = Kind.INTERNAL
        if isinstance(error, asyncio.CancelledError):
            kind = Kind.CANCELLED
        elif isinstance(error, Rejected):
            kind = error.kind
        root = traces.root(self, request, request.version, str(kind), slow=False)
        if root.is_recording():
            if kind is not Kind.CANCELLED:
                root.set_status(trace.StatusCode.ERROR, str(error))
            if kind is Kind.INTERNAL and isinstance(error, Exception):
                root.record_exception(error, timestamp=end)
            name = "admission" if kind in _BEFORE_QUEUE else "queue"
            traces.child(name, trace.set_span_in_context(root), self.start_ns, end)
        root.end(end)


class _Batch:
    """An engine call, and its span once a traced member asks for it."""

    __slots__ = ("_event", "_span")

    def __init__(self, event: BatchDone) -> None:
        self._event = event
        self._span: trace.Span | None = None

    def joined(
        self, tracer: trace.Tracer, member: trace.Span, within: Context, start: int, end: int
    ) -> trace.SpanContext:
        """The span's context, with the member linked to it."""
        if self._span is not None:
            self._span.add_link(member.get_span_context())
            return self._span.get_span_context()
        event = self._event
        self._span = span = tracer.start_span(
            "batch",
            within,
            attributes={
                "fastrec.engine": event.engine,
                "fastrec.lane": event.queue,
                "fastrec.requests": event.requests,
                "fastrec.rows": event.rows,
                "fastrec.predicted_s": event.predicted_s,
            },
            start_time=start,
        )
        # The other members' tasks are in the loop's queue already, so they come before this.
        asyncio.get_running_loop().call_soon(span.end, end)
        return span.get_span_context()


class WorstToo(Sampler):
    """Keeps what another sampler keeps, and refused and slow requests up to a rate.

    Under overload nearly all requests are refused: without the bound, tracing would add to it.

    Args:
        other: decides for the rest.
        per_second: bound of those kept for being refused or slow.
    """

    def __init__(self, other: Sampler, per_second: int = 10) -> None:
        self._other, self._per_second = other, per_second
        self._second, self._kept = 0, 0

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: trace.SpanKind | None = None,
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[trace.Link] | None = None,
        trace_state: trace.TraceState | None = None,
    ) -> SamplingResult:
        """The SDK's interface (:class:`opentelemetry.sdk.trace.sampling.Sampler`)."""
        given = self._other.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )
        if given.decision.is_sampled() or not attributes or _OUTCOME not in attributes:
            return given
        if attributes[_OUTCOME] == "ok" and not attributes[_SLOW]:
            return given
        now = int(time.monotonic())
        if now != self._second:
            self._second, self._kept = now, 0
        if self._kept >= self._per_second:
            return given
        self._kept += 1
        return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, given.trace_state)

    def get_description(self) -> str:
        """The sampler's name and bound."""
        return f"WorstToo({self._other.get_description()}, {self._per_second}/s)"


def over_otlp(share: float) -> TracerProvider:
    """A provider that sends spans over OTLP (gRPC).

    Where to is the environment's to say, as in every OpenTelemetry service:
    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, ...

    Args:
        share: of the requests without a parent that are traced, 0 to 1; those with a parent are
            where it is.

    Raises:
        ArgumentError: a share outside 0..1.
        MissingDependencyError: the exporter is not installed.
    """
    if not 0 <= share <= 1:
        raise ArgumentError("traces", "a share in 0..1", share)
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingDependencyError(
            "opentelemetry-exporter-otlp-proto-grpc", "otel", "tracing over OTLP"
        ) from error
    # "fastrec" unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES names another.
    resource = Resource({"service.name": "fastrec"}).merge(_from_environment())
    sampler = WorstToo(ParentBased(TraceIdRatioBased(share)))
    provider = TracerProvider(sampler=sampler, resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _from_environment() -> Resource:
    found = Resource.create()
    if str(found.attributes.get("service.name", "")).startswith("unknown_service"):
        kept = {k: v for k, v in found.attributes.items() if k != "service.name"}
        return Resource(kept, found.schema_url)
    return found


def _ns(seconds: float) -> int:
    return max(round(seconds * 1e9), 0)
