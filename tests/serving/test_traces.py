"""Spans of real requests: who is whose parent, what time they cover, what is kept."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import grpc
import pytest
from serving_process import request_of

pytest.importorskip("opentelemetry.sdk", reason="fastrec-kernels[otel] is not installed")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased

from fastrec.errors import ArgumentError
from fastrec.serving.core import Queueing, ServingConfig
from fastrec.serving.observe.traces import WorstToo, over_otlp
from fastrec.serving.server import ServerOptions
from fastrec.serving.wire.messages import SERVICE, InferRequest
from fastrec.serving.wire.tensors import to_raw

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SLOW_GOAL = {"slo": {"latency_ms": 60_000.0}}


class Collected:
    """A provider that keeps what it is given."""

    def __init__(self, sampler=ALWAYS_ON):
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler=sampler)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def spans(self, name=None):
        """Those that have ended; a batch ends a moment after its members were answered."""
        found = self.exporter.get_finished_spans()
        end = time.monotonic() + 5
        while name == "batch" and not any(span.name == name for span in found):
            assert time.monotonic() < end
            time.sleep(0.001)
            found = self.exporter.get_finished_spans()
        return [span for span in found if name in (None, span.name)]


@pytest.fixture
def traced(start, engine_path):
    """``traced(sampler, **config) -> (server, what it traced)``."""

    def begin(sampler=ALWAYS_ON, **config):
        collected = Collected(sampler)
        made = ServingConfig.from_dict({**SLOW_GOAL, **config})
        return start(engine_path, made, tracer_provider=collected.provider), collected

    return begin


def rest(running, request, headers=(), **parameters):
    tensors = [
        {"name": n, "datatype": "INT64", "shape": list(a.shape), "data": a.tolist()}
        for n, a in request.items()
    ]
    body = json.dumps({"inputs": tensors, "parameters": parameters}).encode()
    url = f"http://{running.http}/v2/models/ranker/infer"
    with urllib.request.urlopen(urllib.request.Request(url, body, dict(headers)), timeout=30) as r:
        return json.load(r)


def rpc(running, request, metadata=()):
    message = InferRequest(model_name="ranker", id="of-the-caller")
    for name, array in request.items():
        message.inputs.add(name=name, datatype="INT64", shape=array.shape)
        message.raw_input_contents.append(to_raw(array))
    with grpc.insecure_channel(running.grpc) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        return call(message.SerializeToString(), metadata=metadata, timeout=30)


@pytest.mark.parametrize("protocol", [rpc, rest])
def test_a_request_is_a_child_of_its_callers_span(traced, protocol):
    running, collected = traced()
    protocol(running, request_of(), [("traceparent", TRACEPARENT)])
    (root,) = collected.spans("ModelInfer")
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.attributes["fastrec.outcome"] == "ok"
    assert root.attributes["fastrec.model"] == "ranker"
    assert root.attributes["fastrec.version"] == "1"
    parts = [collected.spans(name)[0] for name in ("admission", "queue", "engine")]
    assert all(part.parent.span_id == root.context.span_id for part in parts)
    # They follow each other, without a gap, within the request.
    assert parts[0].start_time == root.start_time
    for before, after in itertools.pairwise(parts):
        assert before.end_time == after.start_time
    assert parts[-1].end_time <= root.end_time
    assert parts[-1].end_time > parts[-1].start_time
    (batch,) = collected.spans("batch")
    assert parts[-1].links[0].context.span_id == batch.context.span_id
    assert (batch.start_time, batch.end_time) == (parts[-1].start_time, parts[-1].end_time)


def test_without_a_caller_each_request_is_a_trace_of_its_own(traced):
    running, collected = traced()
    for _ in range(2):
        rpc(running, request_of())
    roots = collected.spans("ModelInfer")
    assert [root.parent for root in roots] == [None, None]
    assert len({root.context.trace_id for root in roots}) == 2
    assert roots[0].attributes["fastrec.request_id"] == "of-the-caller"


def test_a_batch_is_one_span_that_links_its_members(traced):
    # Batches wait until three requests are there, and batch them without counting time.
    running, collected = traced(
        lanes={"hold_until": 3, "express_priorities": []}, batching={"max_batch_ms": 10_000.0}
    )
    threads = [threading.Thread(target=rpc, args=(running, request_of(seed=i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (batch,) = collected.spans("batch")
    assert batch.attributes["fastrec.requests"] == 3
    assert batch.attributes["fastrec.rows"] == 3 * 2 * 5
    roots = {root.context.span_id for root in collected.spans("ModelInfer")}
    members = {batch.parent.span_id} | {link.context.span_id for link in batch.links}
    assert members == roots
    for engine in collected.spans("engine"):
        assert engine.links[0].context.span_id == batch.context.span_id


def test_a_refused_request_says_why_and_is_kept_where_none_is_sampled(traced):
    running, collected = traced(WorstToo(ParentBased(ALWAYS_OFF)))
    rest(running, request_of())
    assert not collected.spans()
    with pytest.raises(urllib.error.HTTPError) as refused:
        rest(running, request_of(), tier="platinum")
    refused.value.close()
    (root,) = collected.spans("ModelInfer")
    assert root.attributes["fastrec.outcome"] == "invalid"
    assert not root.status.is_ok
    assert "platinum" in root.status.description
    assert [span.name for span in collected.spans()] == ["admission", "ModelInfer"]


def test_a_caller_that_is_not_sampled_is_followed(traced):
    running, collected = traced(ParentBased(ALWAYS_ON))
    rpc(running, request_of(), [("traceparent", TRACEPARENT[:-2] + "00")])
    assert not collected.spans()
    rpc(running, request_of(), [("traceparent", "no such thing")])
    assert len(collected.spans("ModelInfer")) == 1


def test_slow_answers_are_kept(traced):
    never = WorstToo(ParentBased(ALWAYS_OFF))
    running, collected = traced(never, slo={"latency_ms": 1e-3}, admission={"enabled": False})
    rest(running, request_of(), timeout=10_000_000)
    (root,) = collected.spans("ModelInfer")
    assert root.attributes["fastrec.slow"] is True


def test_what_is_kept_for_being_bad_is_bounded():
    sampler = WorstToo(ALWAYS_OFF, per_second=3)
    bad = {"fastrec.outcome": "overload", "fastrec.slow": False}
    kept = [
        sampler.should_sample(None, 1, "ModelInfer", attributes=bad).decision.is_sampled()
        for _ in range(100)
    ]
    # A second may end in between.
    assert 3 <= sum(kept) <= 6


def test_a_server_without_tracing_loads_none_of_it(engine_path):
    code = (
        "import sys, fastrec.serving.server as s; s.ServerOptions()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert ServerOptions().tracer_provider is None
    assert Queueing().hold_until == 0


def test_the_otlp_provider_takes_its_name_from_the_environment(monkeypatch):
    with pytest.raises(ArgumentError, match=r"traces: expected a share in 0\.\.1, got 2"):
        over_otlp(2.0)
    for name, expected in ((None, "fastrec"), ("rankers", "rankers")):
        if name is not None:
            monkeypatch.setenv("OTEL_SERVICE_NAME", name)
        provider = over_otlp(0.5)
        try:
            assert provider.resource.attributes["service.name"] == expected
        finally:
            provider.shutdown()
