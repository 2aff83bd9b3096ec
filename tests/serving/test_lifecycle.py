"""Start and end of a server: one readiness told alike everywhere, a bounded stop."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from serving_process import Running, ranker, request_of

import fastrec
from fastrec.serving import repository
from fastrec.serving.wire.http import HttpReply, HttpServer

grpc = pytest.importorskip("grpc", reason="fastrec-kernels[serve] is not installed")
grpcclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
health_pb2 = pytest.importorskip("grpc_health.v1.health_pb2", reason="dev extra is not installed")
health_pb2_grpc = pytest.importorskip("grpc_health.v1.health_pb2_grpc")


def status(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def answers(server, model):
    """What each kind of probe says of the server, and of a model."""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def health(service):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service))
            return reply.status == health_pb2.HealthCheckResponse.SERVING

        with grpcclient.InferenceServerClient(server.grpc) as client:
            whole = {health(""), client.is_server_ready()}
            single = {health(model), client.is_model_ready(model)}
        whole.add(status(f"http://{server.http}/v2/health/ready")[0] == 200)
        whole.add(json.loads(status(f"http://{server.http}/status.json")[1])["ready"])
        single.add(status(f"http://{server.http}/v2/models/{model}/ready")[0] == 200)
        metrics = status(f"http://{server.http}/metrics")[1].splitlines()
        name = f'fastrec_model_ready{{model="{model}",version="1"}}'
        single |= {float(line.split()[-1]) == 1 for line in metrics if line.startswith(name)}
    assert status(f"http://{server.http}/v2/health/live")[0] == 200
    return whole, single


def infer(server, model):
    with grpcclient.InferenceServerClient(server.grpc) as client:
        tensors = []
        for name, array in request_of().items():
            tensor = grpcclient.InferInput(name, list(array.shape), "INT64")
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        return client.infer(model, tensors).as_numpy("scores")


def test_all_probes_tell_the_same_while_the_server_lingers(engine_path):
    server = Running(engine_path, linger_s=60.0)
    try:
        assert answers(server, "ranker") == ({True}, {True})
        ending = asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop)
        while server.server.core.ready():
            time.sleep(0.01)
        assert answers(server, "ranker") == ({False}, {False})
        assert infer(server, "ranker").shape == (2, 5)  # load balancers look away first
        ending.cancel()
    finally:
        object.__setattr__(server.server.options, "linger_s", 0.0)
        server.close()


def test_ready_means_the_whole_repository(engine_path, tmp_path, monkeypatch):
    shutil.copy(engine_path, tmp_path / "a")
    fastrec.save(ranker(), tmp_path / "b")
    compiling, go_on = threading.Event(), threading.Event()

    async def compiled(checkpoint, cache):
        compiling.set()
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return engine_path

    monkeypatch.setattr(repository, "compiled", compiled)
    made = []
    starting = threading.Thread(target=lambda: made.append(Half(tmp_path)))
    starting.start()
    assert compiling.wait(30)
    server = Half.last
    assert answers(server, "a") == ({False}, {True})
    go_on.set()
    starting.join(60)
    assert answers(server, "b") == ({True}, {True})
    server.close()


class Half(Running):
    """Known before it has started."""

    last: Half

    def __init__(self, path, **options):
        Half.last = self
        super().__init__(path, **options)

    @property
    def grpc(self):
        return f"127.0.0.1:{self.server.grpc_port}"

    @grpc.setter
    def grpc(self, value):
        assert value == self.grpc

    @property
    def http(self):
        return f"127.0.0.1:{self.server.http_port}"

    @http.setter
    def http(self, value):
        assert value == self.http


def keep_calling(url, over):
    while not over.is_set():
        connection = http.client.HTTPConnection(url, timeout=5)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            while not over.is_set():
                connection.request("GET", "/")
                connection.getresponse().read()


def test_an_http_server_stops_while_clients_keep_calling():
    async def handle(request):
        await asyncio.sleep(0)
        return HttpReply(body=b"{}")

    async def run():
        for _ in range(20):
            server = HttpServer(handle, "127.0.0.1:0")
            await server.start()
            over = threading.Event()
            callers = [
                threading.Thread(target=keep_calling, args=(f"127.0.0.1:{server.port}", over))
                for _ in range(3)
            ]
            for caller in callers:
                caller.start()
            await asyncio.sleep(0.05)
            await asyncio.wait_for(server.stop(1.0), 20)
            over.set()
            for caller in callers:
                await asyncio.to_thread(caller.join)

    asyncio.run(run())


def test_a_request_under_way_is_answered_before_its_connection_closes():
    async def run():
        begun = asyncio.Event()

        async def handle(request):
            begun.set()
            await asyncio.sleep(0.2)
            return HttpReply(body=b"{}")

        server = HttpServer(handle, "127.0.0.1:0")
        await server.start()

        def call():
            connection = http.client.HTTPConnection(f"127.0.0.1:{server.port}", timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", "/")
                reply = connection.getresponse()
                return reply.status, reply.getheader("connection"), reply.read()

        calling = asyncio.create_task(asyncio.to_thread(call))
        await begun.wait()
        await server.stop(10.0)
        assert await calling == (200, "close", b"{}")

    asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_model_compiles_ends_the_server(tmp_path, number):
    fastrec.save(ranker(), tmp_path / "ranker")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fastrec", "serve", str(tmp_path / "ranker")),
            *("--grpc-port", "0", "--http-port", "-1", "--cache", str(tmp_path / "cache")),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if "compiling" in line:
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (child := children.read_text().split()):
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == 0
        # The process that inherits the child takes it off the list in its own time.
        end = time.monotonic() + 20
        while Path(f"/proc/{child[0]}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{child[0]}").exists()
    finally:
        process.kill()
        process.communicate()
