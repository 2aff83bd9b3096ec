"""The protocol through Triton's own client, over loopback."""

from __future__ import annotations

import time

import grpc
import numpy as np
import pytest
from wire_client import arrays, inputs

from fastrec.serving.core.request import Kind, Rejected
from fastrec.serving.wire.messages import InferRequest

tritonclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


@pytest.fixture
def url(served):
    return served.start()


@pytest.fixture
def client(url):
    with tritonclient.InferenceServerClient(url) as made:
        yield made


def test_the_server_says_what_it_is(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ranker")
    assert client.is_model_ready("ranker", "1")
    metadata = client.get_server_metadata()
    assert metadata.name == "fastrec"
    assert set(metadata.extensions) == {
        "schedule_policy",
        "parameters",
        "statistics",
        "model_configuration",
        "model_repository",
        "binary_tensor_data",
    }


def test_metadata_and_configuration_come_from_the_engines_spec(client):
    metadata = client.get_model_metadata("ranker")
    assert list(metadata.versions) == ["1", "2"]
    shapes = {i.name: (i.datatype, list(i.shape)) for i in metadata.inputs}
    assert shapes == {
        "item": ("INT64", [-1, -1]),
        "length": ("INT64", [-1]),
        "cand_item": ("INT64", [-1, -1]),
    }
    assert [(o.name, o.datatype, list(o.shape)) for o in metadata.outputs] == [
        ("scores", "FP32", [-1, -1])
    ]
    config = client.get_model_config("ranker").config
    assert (config.name, config.max_batch_size) == ("ranker", 0)
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input][1] == ("length", 9, [-1])
    assert config.parameters["latency_goal_ms"].string_value == "50"
    assert config.dynamic_batching.priority_levels == 3


def test_statistics_and_index(client):
    statistics = client.get_inference_statistics("ranker").model_stats[0]
    assert (statistics.inference_count, statistics.execution_count) == (7, 3)
    assert (statistics.inference_stats.success.count, statistics.inference_stats.queue.ns) == (
        7,
        100,
    )
    index = client.get_model_repository_index()
    assert {(m.name, m.state) for m in index.models} == {
        ("ranker", "READY"),
        ("other", "UNAVAILABLE"),
    }


def test_infer(client, served):
    values = arrays()
    result = client.infer("ranker", inputs(values), request_id="r-1", model_version="2")
    assert np.array_equal(result.as_numpy("scores"), np.arange(10, dtype=np.float32).reshape(2, 5))
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("ranker", "2", "r-1")
    request = served.core.requests[0]
    for name, array in values.items():
        assert np.array_equal(request.inputs[name], array)
        assert request.inputs[name].dtype == array.dtype
    assert (request.priority, request.deadline, request.tier) == (0, None, "")


def test_priority_and_timeout_as_tritons_clients_send_them(client, served):
    client.infer("ranker", inputs(arrays()), priority=1, timeout=2_500_000)
    request = served.core.requests[0]
    assert request.priority == 1
    left = request.deadline - served.core.clock.now()
    assert 0 < left <= 2.5


def test_the_callers_grpc_deadline_counts_too(client, served):
    client.infer("ranker", inputs(arrays()), timeout=60_000_000, client_timeout=3.0)
    # gRPC rounds timeouts of seconds up to 10 ms on the wire.
    assert served.core.requests[0].deadline - served.core.clock.now() <= 3.01


def test_tier_and_tenant_as_parameters_or_metadata(client, served):
    client.infer("ranker", inputs(arrays()), parameters={"tier": "gold", "tenant": "shop"})
    client.infer(
        "ranker",
        inputs(arrays()),
        headers={"fastrec-tier": "bulk", "fastrec-tenant": "blog", "fastrec-priority": "2"},
    )
    client.infer(
        "ranker", inputs(arrays()), parameters={"tier": "gold"}, headers={"fastrec-tier": "bulk"}
    )
    seen = [(r.tier, r.tenant, r.priority) for r in served.core.requests]
    assert seen == [("gold", "shop", 0), ("bulk", "blog", 2), ("gold", "", 0)]


def test_typed_contents(url, served):
    """As a hand-written client in another language sends them."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name="ranker")
    for name, array in arrays().items():
        tensor = request.inputs.add(name=name, datatype="INT64", shape=array.shape)
        tensor.contents.int64_contents.extend(array.reshape(-1).tolist())
    with grpc.insecure_channel(url) as channel:
        reply = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert len(reply.raw_output_contents[0]) == 2 * 5 * 4
    for name, array in arrays().items():
        assert np.array_equal(served.core.requests[0].inputs[name], array)


@pytest.mark.parametrize(
    ("kind", "code", "pushback"),
    [
        (Kind.QUOTA, "RESOURCE_EXHAUSTED", "250"),
        (Kind.OVERLOAD, "UNAVAILABLE", "-1"),
        (Kind.QUEUE_FULL, "UNAVAILABLE", "-1"),
        (Kind.DEADLINE_INFEASIBLE, "UNAVAILABLE", "-1"),
        (Kind.EXPIRED, "UNAVAILABLE", "-1"),
        (Kind.NOT_READY, "UNAVAILABLE", None),
        (Kind.NOT_FOUND, "NOT_FOUND", None),
        (Kind.INVALID, "INVALID_ARGUMENT", None),
        (Kind.CANCELLED, "CANCELLED", None),
        (Kind.INTERNAL, "INTERNAL", None),
    ],
)
def test_every_refusal_has_a_code_and_machine_readable_details(url, served, kind, code, pushback):
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    def refuse(_):
        raise Rejected(kind, "as the test says", 0.25 if kind is Kind.QUOTA else None)

    served.core.reply = refuse
    request = service_pb2.ModelInferRequest(model_name="ranker")
    for name, array in arrays().items():
        request.inputs.add(name=name, datatype="INT64", shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    with grpc.insecure_channel(url) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert caught.value.code().name == code
    assert caught.value.details() == "as the test says"
    trailers = dict(caught.value.trailing_metadata())
    assert trailers.get("grpc-retry-pushback-ms") == pushback
    details = {d.TypeName(): d for d in rpc_status.from_call(caught.value).details}
    info = error_details_pb2.ErrorInfo()
    details["google.rpc.ErrorInfo"].Unpack(info)
    assert (info.reason, info.domain) == (kind.value.upper(), "fastrec")
    if kind is Kind.QUOTA:
        retry = error_details_pb2.RetryInfo()
        details["google.rpc.RetryInfo"].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == 250


def test_what_is_shed_is_refused_before_its_tensors_are_read(url, served):
    """A refusal costs the server no decoding: this one is of a message that could not be."""

    asked = []

    class Shedding:
        class signature:
            @staticmethod
            def size_of(shapes):
                return shapes["cand_item"] and tuple(shapes["cand_item"])

        def turn_away(self, request, size):
            asked.append((request.tier, request.priority, tuple(size)))
            if request.tier != "gold":
                raise Rejected(Kind.OVERLOAD, "as the test says")

    served.core.shedding = lambda model, version: Shedding()

    def send(tier, size):
        request = InferRequest(model_name="ranker")
        request.parameters["tier"].string_param = tier
        for name, array in arrays().items():
            request.inputs.add(name=name, datatype="INT64", shape=array.shape)
            request.raw_input_contents.append(array.tobytes()[:size])
        with grpc.insecure_channel(url) as channel:
            channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(
                request.SerializeToString()
            )

    with pytest.raises(grpc.RpcError) as caught:
        send("bulk", 5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not served.core.requests
    with pytest.raises(grpc.RpcError) as caught:
        send("gold", 5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    send("gold", None)
    assert len(served.core.requests) == 1
    assert asked == [("bulk", 0, (2, 5)), ("gold", 0, (2, 5)), ("gold", 0, (2, 5))]


def test_an_error_that_is_not_ours_keeps_its_text_to_the_log(client, served, caplog):
    def fail(_):
        raise OSError("/secret/path")

    served.core.reply = fail
    for _ in range(5):
        with pytest.raises(tritonclient.InferenceServerException, match="internal error") as caught:
            client.infer("ranker", inputs(arrays()))
        assert "secret" not in str(caught.value)
    assert len([r for r in caplog.records if "secret" in r.getMessage()]) == 1


def test_a_cancelled_call_is_cancelled_in_the_runtime(url, served):
    import asyncio

    served.core.reply = lambda _: asyncio.sleep(30)
    with tritonclient.InferenceServerClient(url) as client:
        context = client.async_infer("ranker", inputs(arrays()), callback=lambda *_: None)
        assert served.core.arrived.wait(5)
        context.cancel()
        assert served.core.cancelled.wait(5)


def test_load_and_unload_from_loopback(client, served):
    client.load_model("other")
    client.unload_model("ranker")
    assert served.repository.calls == [("load", "other"), ("unload", "ranker")]
    with pytest.raises(tritonclient.InferenceServerException, match="parameters: expected none"):
        client.load_model("other", config='{"backend": "python"}', files={"file:1/model.py": b"x"})


def test_admin_calls_can_be_switched_off(served):
    refused = pytest.raises(tritonclient.InferenceServerException, match="not allowed")
    with tritonclient.InferenceServerClient(served.start(admin=False)) as client, refused:
        client.load_model("other")
    assert served.repository.calls == []


def test_what_is_not_served_is_unimplemented(client):
    with pytest.raises(tritonclient.InferenceServerException) as caught:
        client.get_system_shared_memory_status()
    assert "UNIMPLEMENTED" in str(caught.value)


def test_health_service(url, served):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(url) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def check(service):
            return stub.Check(health_pb2.HealthCheckRequest(service=service)).status

        for service in ("", "inference.GRPCInferenceService", "ranker"):
            assert check(service) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="ranker"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        # A watcher that leaves takes no other with it.
        other = stub.Watch(health_pb2.HealthCheckRequest(service="ranker"))
        assert next(other).status == health_pb2.HealthCheckResponse.SERVING
        other.cancel()
        served.core.is_ready = False
        served.loop.call_soon_threadsafe(served.server.health.changed)
        began = time.monotonic()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert time.monotonic() - began < 0.9  # told, not polled
        assert check("") == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


def test_reflection(url):
    from grpc_reflection.v1alpha import reflection_pb2
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with grpc.insecure_channel(url) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "inference.GRPCInferenceService" in database.get_services()
        file = database.FindFileContainingSymbol("inference.ModelInferRequest")
        assert file.package == "inference"
        assert (
            database.FindFileContainingSymbol("grpc.health.v1.Health").package == "grpc.health.v1"
        )
        with pytest.raises(KeyError):
            database.FindFileContainingSymbol("inference.Nothing")
        # Newer clients ask for v1, whose messages are the same.
        ask = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        (reply,) = ask(
            iter([reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()])
        )
        listed = reflection_pb2.ServerReflectionResponse.FromString(reply).list_services_response
        assert "inference.GRPCInferenceService" in {s.name for s in listed.service}


@pytest.mark.parametrize(("timeout_s", "kept_s"), [(0.02, 0.001), (0.05, 0.0025), (10.0, 0.0025)])
def test_some_of_the_callers_time_is_kept_for_the_answers_way_back(timeout_s, kept_s):
    import asyncio

    from fastrec.serving.core.clock import VirtualClock
    from fastrec.serving.wire.auth import ANYONE
    from fastrec.serving.wire.request_handler import RequestHandler
    from fastrec.serving.wire.request_parameters import RequestParameters

    class InferenceCore:
        clock = VirtualClock(7.0)

        async def infer(self, request):
            return request

    async def ask(parameters, remaining_s=None):
        handler = RequestHandler(InferenceCore())
        return await handler.infer("m", "", {}, parameters, ANYONE, remaining_s=remaining_s)

    asked = asyncio.run(ask(RequestParameters(timeout_s=timeout_s)))
    assert asked.deadline == pytest.approx(7.0 + timeout_s - kept_s)
    sooner = asyncio.run(ask(RequestParameters(timeout_s=60.0), timeout_s))
    assert sooner.deadline == asked.deadline
    assert asyncio.run(ask(RequestParameters())).deadline is None
