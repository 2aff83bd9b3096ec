"""HTTP: compressed and large bodies, numbers that JSON has not, statistics, bounds."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import os
import signal
import time
import zlib

import numpy as np
import pytest
from serving_process import Running

from fastrec.serving.wire.http import HttpLimits, HttpReply, HttpServer
from fastrec.spec import InputField, InputSpec

INFER = "/v2/models/adding/infer"


class Adding:
    """Scores are the input; ids 0 and 1 give NaN and an infinity."""

    spec = InputSpec((InputField("item", ("B", "m"), rows=100),), {"B": (1, 64), "m": (1, None)})

    def __call__(self, item):
        scores = item.astype(np.float32)
        scores[item == 0] = np.nan
        scores[item == 1] = -np.inf
        return scores


@pytest.fixture(scope="module")
def server():
    made = Running(None)
    made.run(made.server.core.load("adding", Adding))
    yield made
    made.close()


def call(server, path, body=None, method=None, **headers):
    connection = http.client.HTTPConnection(server.http, timeout=60)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def body_of(values, **more):
    tensor = {"name": "item", "datatype": "INT64", "shape": [1, len(values)], "data": values}
    return json.dumps({"inputs": [tensor], **more}).encode()


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_nan_is_null_in_json_and_itself_in_binary(server):
    status, text = call(server, INFER, body_of([5, 0]))
    assert status == 200
    assert strictly(text)["outputs"][0]["data"] == [5.0, None]
    status, data = call(server, INFER, body_of([5, 0], parameters={"binary_data_output": True}))
    assert status == 200
    np.testing.assert_array_equal(np.frombuffer(data[-8:], np.float32), [5.0, np.nan])


def test_infinities_are_refused_in_json_not_altered(server):
    status, text = call(server, INFER, body_of([5, 1]))
    assert status == 500
    assert "scores" in strictly(text)["error"]
    status, data = call(server, INFER, body_of([1], parameters={"binary_data_output": True}))
    assert status == 200
    np.testing.assert_array_equal(np.frombuffer(data[-4:], np.float32), [-np.inf])


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_constants_that_json_has_not_are_refused(server, constant):
    status, _ = call(server, INFER, body_of([7]).replace(b"7", constant.encode()))
    assert status == 400


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_bodies(server, encoding, compress):
    body = body_of([2, 3])
    status, text = call(server, INFER, compress(body), **{"content-encoding": encoding})
    assert status == 200
    assert strictly(text)["outputs"][0]["data"] == [2.0, 3.0]
    headers = {"content-encoding": encoding}
    assert call(server, INFER, compress(body)[:-9], **headers)[0] == 400
    assert call(server, INFER, b"not compressed", **headers)[0] == 400
    # 64 MiB in 64 KiB.
    assert call(server, INFER, compress(bytes(64 << 20)), **headers)[0] == 413


def test_an_unknown_encoding_is_415(server):
    assert call(server, INFER, b"x", **{"content-encoding": "br"})[0] == 415
    assert call(server, INFER, body_of([2]), **{"content-encoding": "identity"})[0] == 200


def test_statistics_count_all_kinds_of_computing_alike(server):
    status, text = call(server, "/v2/models/stats")
    assert status == 200
    (row,) = strictly(text)["model_stats"]
    assert call(server, INFER, body_of([2]))[0] == 200
    _, text = call(server, "/v2/models/adding/stats")
    (after,) = strictly(text)["model_stats"]
    assert after["inference_count"] == row["inference_count"] + 1
    stats = after["inference_stats"]
    kinds = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    assert {stats[kind]["count"] for kind in kinds} == {after["inference_count"]}
    assert stats["compute_infer"]["ns"] > 0


def test_a_model_that_was_never_called_has_statistics(server):
    server.run(server.server.core.load("idle", Adding))
    _, text = call(server, "/v2/models/idle/stats")
    (row,) = strictly(text)["model_stats"]
    assert (row["inference_count"], row["inference_stats"]["success"]["count"]) == (0, 0)


def test_a_large_json_body_does_not_stop_the_loop(server):
    values = list(range(2, 100)) * 20_000  # 8 MiB of text
    lags = []

    async def watch():
        while True:
            due = time.monotonic() + 0.002
            await asyncio.sleep(0.002)
            lags.append(time.monotonic() - due)

    async def begin():
        return asyncio.ensure_future(watch())

    decoded = []
    handler = server.server.handler
    plain = handler.infer

    async def infer(name, version, inputs, *args, **options):
        decoded.append(len(lags))
        inputs = {key: value[:, :100] for key, value in inputs.items()}
        return await plain(name, version, inputs, *args, **options)

    watching = server.run(begin())
    handler.infer = infer
    try:
        status, text = call(server, INFER, body_of(values))
    finally:
        del handler.infer
        server.loop.call_soon_threadsafe(watching.cancel)
    assert status == 200
    assert strictly(text)["outputs"][0]["data"] == [float(v) for v in values[:100]]
    # Parsing it here would be one gap; the loop's timer ran all the while instead.
    assert decoded[0] > 50


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda b: b.replace(b"INT64", b"FP33"), "item"),
        (lambda b: b.replace(b"[1, 40000]", b"[2, 40000]"), "item"),
        (lambda b: b[:-1], "JSON"),
    ],
)
def test_what_is_wrong_in_a_large_body_is_told_all_the_same(server, change, told):
    status, text = call(server, INFER, change(body_of([2] * 40_000)))
    assert status == 400
    assert told in strictly(text)["error"]


def test_a_decoder_that_dies_is_replaced(server):
    assert call(server, INFER, body_of([2] * 40_000))[0] == 200
    os.kill(server.server._rest._decode._process.pid, signal.SIGKILL)
    status, text = call(server, INFER, body_of([2] * 40_000))
    assert status == 503
    assert strictly(text)["reason"] == "NOT_READY"
    assert call(server, INFER, body_of([2] * 40_000))[0] == 200


def test_two_lengths_are_refused(server):
    connection = http.client.HTTPConnection(server.http, timeout=10)
    connection.putrequest("POST", INFER)
    connection.putheader("content-length", "4")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders(b"0\r\n\r\n")
    assert connection.getresponse().status == 400
    connection.close()


def test_bodies_are_bounded_over_all_connections():
    async def run():
        async def handle(request):
            return HttpReply(body=b"{}")

        limits = HttpLimits(message_mib=2, total_mib=4)
        server = HttpServer(handle, "127.0.0.1:0", limits=limits)
        await server.start()
        head = f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {2 << 20}\r\n\r\n".encode()
        open_ones = []
        refused = 0
        for _ in range(4):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head + bytes((2 << 20) - 1))
            open_ones.append((reader, writer))
        done, waiting = await asyncio.wait(
            [asyncio.ensure_future(reader.readline()) for reader, _ in open_ones],
            timeout=30,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in done:
            assert task.result().startswith(b"HTTP/1.1 503")
            refused += 1
        assert refused >= 1
        assert sum(server._held.values()) <= 4 << 20
        for task in waiting:
            task.cancel()
        for _, writer in open_ones:
            writer.close()
        await server.stop()

    asyncio.run(run())
