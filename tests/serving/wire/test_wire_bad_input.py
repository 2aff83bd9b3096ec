"""Wrong, hostile and truncated requests get typed errors, and the server goes on."""

from __future__ import annotations

import logging
import socket

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastrec.errors import FastrecError
from fastrec.serving.wire.grpc_server import Limits
from fastrec.serving.wire.messages import InferRequest, InferResponse
from fastrec.serving.wire.request_parameters import from_values, parameter_values
from fastrec.serving.wire.tensors import DATATYPES, datatype, from_raw, tensor_inputs, to_raw
from fastrec.serving.wire.tensors import from_values as tensor_of

METHOD = "/inference.GRPCInferenceService/ModelInfer"


def good(**changes):
    request = InferRequest(model_name="ranker", **changes)
    for name, shape in (("item", (1, 12)), ("length", (1,)), ("cand_item", (1, 5))):
        array = np.ones(shape, np.int64)
        request.inputs.add(name=name, datatype="INT64", shape=shape)
        request.raw_input_contents.append(array.tobytes())
    return request


@pytest.fixture
def call(served):
    """Bytes in, bytes or RpcError out."""
    url = served.start(max_users=64)
    with grpc.insecure_channel(url) as channel:
        method = channel.unary_unary(METHOD)

        def send(request, **settings):
            data = request if isinstance(request, bytes) else request.SerializeToString()
            return InferResponse.FromString(method(data, timeout=20, **settings))

        yield send


def refused(call, request, code, text, **settings):
    with pytest.raises(grpc.RpcError) as caught:
        call(request, **settings)
    assert caught.value.code().name == code, caught.value
    assert text in caught.value.details()
    call(good())  # and goes on


@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0], [2**32, 2**32], [0, 2**31, 2**31]])
def test_shapes_that_no_array_can_have(call, shape):
    wrong = good()
    wrong.inputs[0].shape[:] = shape
    wrong.raw_input_contents[0] = b""
    refused(call, wrong, "INVALID_ARGUMENT", "item: expected")
    with pytest.raises(FastrecError, match="x: expected"):
        tensor_of("x", "INT64", shape, [])


def test_bytes_that_are_no_message(call):
    refused(call, b"\xff\xff\xff\xff", "INVALID_ARGUMENT", "4 bytes that do not parse")
    whole = good().SerializeToString()
    refused(call, whole[: len(whole) - 7], "INVALID_ARGUMENT", "ModelInferRequest")


def test_bad_utf8(call):
    # Field 1, length 4: a model name that is no UTF-8.
    refused(call, b"\x0a\x04ab\xc3\x28", "INVALID_ARGUMENT", "ModelInferRequest")


def edit(change):
    request = good()
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r.raw_input_contents.pop(), "one for each of 3 inputs, got 2"),
        (lambda r: r.raw_input_contents.append(b""), "one for each of 3 inputs, got 4"),
        (
            lambda r: r.raw_input_contents.__setitem__(0, r.raw_input_contents[0][:-1]),
            "item: expected 96 bytes for shape [1, 12] of INT64, got 95 bytes",
        ),
        (lambda r: r.inputs[0].shape.append(1 << 40), "item: expected 105553116266496 bytes"),
        (lambda r: r.inputs[0].shape.append(-1), "sizes of 0 or more"),
        (lambda r: r.inputs[0].shape.extend([1] * 30), "a rank up to 8"),
        (lambda r: setattr(r.inputs[0], "datatype", "FP33"), "a datatype among"),
        (lambda r: setattr(r.inputs[0], "datatype", "BYTES"), "a datatype among"),
        (lambda r: setattr(r.inputs[0], "datatype", "UINT64"), "item: expected int64"),
        (lambda r: setattr(r.inputs[0], "name", "items"), "'item' is missing"),
        (lambda r: setattr(r.inputs[0], "name", "length"), "one input of this name, got two"),
        (lambda r: setattr(r.inputs[0], "name", "i" * 5000), "names of up to 256"),
        (lambda r: r.inputs[0].contents.int64_contents.append(1), "raw contents alone"),
        (
            lambda r: r.inputs[0].parameters["shared_memory_region"].SetInParent(),
            "shared memory, not served",
        ),
        (lambda r: r.outputs.add(name="logits"), "names among ['scores'], got logits"),
        (lambda r: setattr(r, "id", "x" * 1000), "at most 128 characters"),
        (lambda r: setattr(r.parameters["priority"], "int64_param", -1), "priority"),
        (lambda r: setattr(r.parameters["priority"], "string_param", "1"), "priority"),
        (lambda r: setattr(r.parameters["timeout"], "int64_param", -5), "timeout"),
        (lambda r: setattr(r.parameters["tier"], "string_param", "a\nb"), "printable text"),
        (lambda r: setattr(r.parameters["tenant"], "string_param", "t" * 500), "up to 128"),
    ],
)
def test_wrong_requests_are_named(call, change, text):
    refused(call, edit(change), "INVALID_ARGUMENT", text)


def test_ids_out_of_range_reach_no_engine(call):
    request = good()
    request.raw_input_contents[2] = np.full((1, 5), 50).tobytes()
    refused(call, request, "INVALID_ARGUMENT", "cand_item: expected ids in 0..49, got 50")


def test_unknown_model_and_version(call):
    refused(call, edit(lambda r: setattr(r, "model_name", "x" * 300)), "NOT_FOUND", "unknown model")
    refused(call, edit(lambda r: setattr(r, "model_version", "9")), "NOT_FOUND", "unknown model")
    refused(call, edit(lambda r: setattr(r, "model_name", "../../etc")), "NOT_FOUND", "unknown")


def test_too_many_users(call):
    request = InferRequest(model_name="ranker")
    for name, shape in (("item", (65, 12)), ("length", (65,)), ("cand_item", (65, 5))):
        request.inputs.add(name=name, datatype="INT64", shape=shape)
        request.raw_input_contents.append(np.ones(shape, np.int64).tobytes())
    refused(call, request, "INVALID_ARGUMENT", "at most 64 users a request, got 65")


def test_a_metadata_priority_that_is_no_number(call):
    refused(
        call, good(), "INVALID_ARGUMENT", "fastrec-priority", metadata=[("fastrec-priority", "-1")]
    )


def test_a_message_over_the_limit_is_refused_before_it_is_read(served):
    url = served.start(limits=Limits(message_mib=1))
    request = good()
    request.raw_input_contents[0] = bytes(8 << 20)
    with grpc.insecure_channel(url) as channel:
        method = channel.unary_unary(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            method(request.SerializeToString(), timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        method(good().SerializeToString(), timeout=20)
    assert len(served.core.requests) == 1


def test_clients_that_never_finish_are_sent_away(served):
    """A client that opens a request and never ends it; gRPC closes the connection 20 s later."""
    url = served.start(limits=Limits(connection_age_s=0.5))
    host, port = url.split(":")
    goaway = 7
    with socket.create_connection((host, int(port))) as slow:
        slow.settimeout(10)
        slow.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        stream, kinds = slow.makefile("rb"), []
        while goaway not in kinds:
            header = stream.read(9)
            assert len(header) == 9, "closed without a word"
            kinds.append(header[3])
            stream.read(int.from_bytes(header[:3], "big"))
    with grpc.insecure_channel(url) as channel:
        channel.unary_unary(METHOD)(good().SerializeToString(), timeout=20)


def test_a_flood_of_bad_requests_is_one_line(call, caplog):
    caplog.set_level(logging.INFO, "fastrec.serving")
    bad = edit(lambda r: setattr(r.inputs[0], "datatype", "FP33\nERROR forged"))
    for _ in range(50):
        with pytest.raises(grpc.RpcError):
            call(bad)
    lines = [r.getMessage() for r in caplog.records if r.name == "fastrec.serving"]
    assert len(lines) == 1
    assert "\n" not in lines[0]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_fuzz_any_bytes_parse_or_are_refused(data):
    from google.protobuf.message import DecodeError

    try:
        request = InferRequest.FromString(data)
    except DecodeError:
        return
    try:
        from_values(parameter_values(request.parameters))
        held = sum(array.nbytes for array in tensor_inputs(request).values())
    except FastrecError as error:
        told = str(error)
    else:
        told = ""
        assert held <= 8 * len(data)
    assert len(told) < 2000


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_fuzz_changed_messages(data):
    """A valid message with some bytes changed, cut or doubled."""
    from google.protobuf.message import DecodeError

    wire = bytearray(good(id="r").SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(wire) - 1))
        wire[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(wire)))
    try:
        request = InferRequest.FromString(bytes(wire[:cut]))
        tensor_inputs(request)
        from_values(parameter_values(request.parameters))
    except (DecodeError, FastrecError):
        pass


@pytest.mark.parametrize("kind", DATATYPES)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=st.lists(st.integers(0, 4), max_size=4), seed=st.integers(0, 1000))
def test_tensors_survive_the_wire(kind, shape, seed):
    dtype = np.dtype(DATATYPES[kind][0])
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = np.random.default_rng(seed).bytes(size)
    if kind == "BOOL":
        data = bytes(b & 1 for b in data)
    array = from_raw("x", kind, shape, data)
    assert array.dtype == dtype
    assert array.shape == tuple(shape)
    assert to_raw(array) == data
    assert datatype(array.dtype) == kind
    if DATATYPES[kind][1] and not (dtype.kind == "f" and not np.isfinite(array).all()):
        assert np.array_equal(tensor_of("x", kind, shape, array.reshape(-1).tolist()), array)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("INT8", [128]),
        ("INT8", [-129]),
        ("UINT8", [-1]),
        ("UINT64", [-1]),
        ("INT64", [2**63]),
        ("INT64", [1.5]),
        ("INT64", ["1"]),
        ("INT64", [None]),
        ("INT64", [True]),
        ("BOOL", [2]),
        ("FP32", ["a"]),
        ("INT64", [[1]]),
        ("INT64", [1, 2]),
        ("INT64", [{}]),
    ],
)
def test_values_that_do_not_fit(kind, values):
    with pytest.raises(FastrecError, match="x: expected"):
        tensor_of("x", kind, [1], values)
