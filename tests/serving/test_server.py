"""A saved model behind the real server, through Triton's clients."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from serving_process import ranker, request_of

import fastrec
from fastrec.errors import ArgumentError, ArtifactError
from fastrec.runtime import load_engine
from fastrec.serving.repository import ModelRepository
from fastrec.serving.server import ServerOptions

grpcclient = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
httpclient = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")


def inputs(client, request):
    made = []
    for name, array in request.items():
        tensor = client.InferInput(name, list(array.shape), "INT64")
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def get(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as reply:
        return reply.read().decode(), reply.headers


def test_the_engines_scores_arrive(running, engine_path):
    request = request_of(users=3, candidates=7)
    expected = load_engine(engine_path)(*request.values())
    with grpcclient.InferenceServerClient(running.grpc) as client:
        result = client.infer("ranker", inputs(grpcclient, request))
        assert np.array_equal(result.as_numpy("scores"), expected)
        assert client.get_model_metadata("ranker").outputs[0].name == "scores"
        statistics = client.get_inference_statistics("ranker").model_stats[0]
        assert statistics.inference_count >= 1
        assert statistics.inference_stats.success.ns > 0
        with pytest.raises(
            grpcclient.InferenceServerException, match=r"cand_item: expected ids in 0\.\.299"
        ):
            client.infer(
                "ranker", inputs(grpcclient, {**request, "cand_item": request["cand_item"] + 300})
            )


def test_rest_with_and_without_binary_tensors(running, engine_path):
    request = request_of()
    expected = load_engine(engine_path)(*request.values())
    with httpclient.InferenceServerClient(running.http) as client:
        assert client.is_server_ready()
        assert client.is_model_ready("ranker", "1")
        assert client.get_model_metadata("ranker")["inputs"][0]["datatype"] == "INT64"
        assert client.get_model_config("ranker")["platform"] == "fastrec"
        assert client.get_inference_statistics("ranker")["model_stats"][0]["name"] == "ranker"
        assert client.get_model_repository_index()[0]["state"] == "READY"
        for binary in (True, False):
            output = httpclient.InferRequestedOutput("scores", binary_data=binary)
            made = inputs(httpclient, request)
            result = client.infer("ranker", made, outputs=[output], request_id="7", priority=1)
            assert np.array_equal(result.as_numpy("scores"), expected)
            assert result.get_response()["id"] == "7"
    body = {
        "inputs": [
            {"name": k, "datatype": "INT64", "shape": list(v.shape), "data": v.tolist()}
            for k, v in request.items()
        ]
    }
    url = f"http://{running.http}/v2/models/ranker/infer"
    with urllib.request.urlopen(url, json.dumps(body).encode(), timeout=10) as reply:
        output = json.load(reply)["outputs"][0]
    assert np.array_equal(np.float32(output["data"]).reshape(output["shape"]), expected)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v2/models/nobody", None, 404),
        ("/v2/models/ranker/infer", b"{", 400),
        ("/v2/models/ranker/infer", b"[" * 100_000, 400),
        ("/v2/models/ranker/infer", b'{"inputs": [{"name": "item"}]}', 400),
        ("/v2/models/ranker/infer", b'{"inputs": []}', 400),
        ("/v2/models/ranker/infer", b"\xff\xfe", 400),
        ("/v2/models/ranker/infer", None, 404),
        ("/../etc/passwd", None, 404),
        ("/v2/repository/models/..%2F..%2Fetc/load", b"{}", 404),
        ("/v2/models/ranker/infer", bytes(17 << 20), 413),
    ],
)
def test_bad_http_requests(running, path, body, status):
    try:
        with urllib.request.urlopen(f"http://{running.http}{path}", body, timeout=10) as reply:
            got = reply.status
    except urllib.error.HTTPError as error:
        got, told = error.code, json.load(error)
        error.close()
    except (ConnectionError, urllib.error.URLError):
        assert status == 413  # closed while the client was still sending
        return
    assert got == status
    assert set(told) >= {"error"}


def test_metrics_are_valid_and_hold_the_goal_as_an_edge(running):
    from prometheus_client.parser import text_string_to_metric_families

    with grpcclient.InferenceServerClient(running.grpc) as client:
        client.infer("ranker", inputs(grpcclient, request_of()))
    text, headers = get(f"http://{running.http}/metrics")
    assert headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(text)}
    samples = families["fastrec_request_duration_seconds"].samples
    assert {s.labels["le"] for s in samples if "le" in s.labels} >= {"0.05", "+Inf"}
    ok = [s for s in samples if s.name.endswith("_count") and s.labels["outcome"] == "ok"]
    assert ok[0].value >= 1
    assert ok[0].labels["model"] == "ranker"
    assert families["fastrec_model_ready"].samples[0].value == 1
    assert not [s for f in families.values() for s in f.samples if "tenant" in s.labels]
    text, headers = get(f"http://{running.http}/metrics", accept="application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_no_torch_in_the_serving_process(engine_path, tmp_path):
    """The command, as a user starts it: what it imports, what it answers, how it ends."""
    ready = tmp_path / "ready.json"
    code = (
        "import sys\n"
        "from fastrec.cli import app, _mount\n"
        "_mount()\n"
        "app(standalone_mode=False)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    arguments = ["serve", str(engine_path), "--grpc-port", "0", "--http-port", "-1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--ready-file", str(ready)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 60
        while not (ready.exists() and ready.read_text()):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        port = json.loads(ready.read_text())["grpc_port"]
        with grpcclient.InferenceServerClient(f"127.0.0.1:{port}") as client:
            assert client.infer("ranker", inputs(grpcclient, request_of())).as_numpy(
                "scores"
            ).shape == (2, 5)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, stderr


def test_a_repository_of_models_and_versions(start, engine_path, other_path, tmp_path):
    shutil.copy(engine_path, tmp_path / "single.engine")
    (tmp_path / "two").mkdir()
    shutil.copy(other_path, tmp_path / "two" / "1")
    shutil.copy(engine_path, tmp_path / "two" / "3")
    (tmp_path / "notes.txt").write_text("no model")
    server = start(tmp_path)
    with grpcclient.InferenceServerClient(server.grpc) as client:
        index = {(m.name, m.version): m.state for m in client.get_model_repository_index().models}
        assert index == {
            ("single", "1"): "READY",
            ("two", "1"): "UNAVAILABLE",
            ("two", "3"): "READY",
        }
        request = request_of()
        newest = client.infer("two", inputs(grpcclient, request))
        assert newest.get_response().model_version == "3"
        with pytest.raises(grpcclient.InferenceServerException, match="version 1 is not found"):
            client.infer("two", inputs(grpcclient, request), model_version="1")
        os.remove(tmp_path / "two" / "3")
        client.load_model("two")
        expected = load_engine(other_path)(*request.values())
        older = client.infer("two", inputs(grpcclient, request))
        assert older.get_response().model_version == "1"
        assert np.array_equal(older.as_numpy("scores"), expected)
        client.unload_model("single")
        assert not client.is_model_ready("single")
        assert client.is_model_ready("two")


def test_load_reload_and_unload(start, engine_path, other_path, tmp_path):
    shutil.copy(engine_path, tmp_path / "ranker")
    server = start(tmp_path)
    request = request_of()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        before = client.infer("ranker", inputs(grpcclient, request)).as_numpy("scores")
        shutil.copy(other_path, tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "ranker")
        client.load_model("ranker")
        after = client.infer("ranker", inputs(grpcclient, request)).as_numpy("scores")
        assert not np.array_equal(before, after)
        client.unload_model("ranker")
        with pytest.raises(grpcclient.InferenceServerException, match="NOT_FOUND"):
            client.infer("ranker", inputs(grpcclient, request))
        states = {m.name: m.state for m in client.get_model_repository_index().models}
        assert states == {"ranker": "UNAVAILABLE"}
        client.load_model("ranker")
        for name in ("nobody", "../ranker", "/etc/passwd", ""):
            with pytest.raises(grpcclient.InferenceServerException, match="NOT_FOUND"):
                client.load_model(name)


def test_a_new_version_takes_over_once_it_is_loaded(start, engine_path, other_path, tmp_path):
    folder = tmp_path / "ranker"
    folder.mkdir()
    shutil.copy(engine_path, folder / "1")
    server = start(tmp_path)
    request = request_of()
    with grpcclient.InferenceServerClient(server.grpc) as client:

        def serves():
            reply = client.infer("ranker", inputs(grpcclient, request))
            return reply.get_response().model_version, reply.as_numpy("scores").tobytes()

        first = serves()
        assert first[0] == "1"
        shutil.copy(other_path, folder / "2")
        client.load_model("ranker")
        second = serves()
        assert second[0] == "2"
        assert second[1] != first[1]
        # A third one that is damaged: the second goes on, and the index says why.
        (folder / "3").write_bytes(engine_path.read_bytes()[:-100])
        with pytest.raises(grpcclient.InferenceServerException):
            client.load_model("ranker")
        assert serves() == second
        assert client.is_server_ready()
        rows = {m.version: m for m in client.get_model_repository_index().models}
        assert [rows[v].state for v in "123"] == ["UNAVAILABLE", "READY", "UNAVAILABLE"]
        assert rows["1"].reason == "version 3 is the latest"
        assert rows["3"].reason


def test_a_failed_reload_keeps_the_model_that_works(start, engine_path, other_path, tmp_path):
    shutil.copy(engine_path, tmp_path / "ranker")
    server = start(tmp_path)
    request = request_of()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        before = client.infer("ranker", inputs(grpcclient, request)).as_numpy("scores")
        (tmp_path / "new").write_bytes(other_path.read_bytes()[:-100])
        os.replace(tmp_path / "new", tmp_path / "ranker")
        with pytest.raises(grpcclient.InferenceServerException):
            client.load_model("ranker")
        again = client.infer("ranker", inputs(grpcclient, request)).as_numpy("scores")
        assert np.array_equal(before, again)
        (row,) = client.get_model_repository_index().models
        assert row.state == "READY"
        assert row.reason
        shutil.copy(other_path, tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "ranker")
        client.load_model("ranker")
        after = client.infer("ranker", inputs(grpcclient, request)).as_numpy("scores")
        assert not np.array_equal(before, after)
        assert not client.get_model_repository_index().models[0].reason


def test_files_overwritten_in_place_do_not_reach_the_engine_that_runs(
    start, engine_path, other_path, tmp_path
):
    shutil.copy(engine_path, tmp_path / "ranker")
    server = start(tmp_path)
    request = request_of()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        before = client.infer("ranker", inputs(grpcclient, request)).as_numpy("scores")
        for data in (other_path.read_bytes(), engine_path.read_bytes()[:5000], b""):
            (tmp_path / "ranker").write_bytes(data)
            again = client.infer("ranker", inputs(grpcclient, request)).as_numpy("scores")
            assert np.array_equal(before, again)
        copy = server.server.repository._copies["ranker", "1"]
        assert copy.exists()
        client.unload_model("ranker")
        assert not copy.parent.exists()


def test_reloads_under_traffic_refuse_nothing(start, engine_path, other_path, tmp_path):
    shutil.copy(engine_path, tmp_path / "ranker")
    server = start(tmp_path)
    over, outcomes = threading.Event(), []

    def call():
        with grpcclient.InferenceServerClient(server.grpc) as client:
            while not over.is_set():
                outcomes.append(client.infer("ranker", inputs(grpcclient, request_of())))

    caller = threading.Thread(target=call)
    caller.start()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        for i in range(4):
            shutil.copy((other_path, engine_path)[i % 2], tmp_path / "new")
            os.replace(tmp_path / "new", tmp_path / "ranker")
            client.load_model("ranker")
    assert caller.is_alive()  # no call failed
    over.set()
    caller.join(30)
    assert outcomes


def test_what_is_left_out_of_a_repository_is_logged(engine_path, tmp_path, caplog):
    names = [
        "good.engine",
        "my ranker.engine",
        "_x",
        "a/v1",
        "a/01",
        "b/1700000000",
        "twice.engine",
    ]
    names += ["twice.fastrec", "triton/2/model.fastrec"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(engine_path, tmp_path / name)
    repository = ModelRepository(tmp_path, None)
    found = {name: sorted(versions) for name, versions in repository.scan().items()}
    assert found == {"b": ["1700000000"], "good": ["1"], "triton": ["2"], "twice": ["1"]}
    left_out = [record.getMessage() for record in caplog.records]
    for name in ("my ranker.engine", "_x", "a/v1", "a/01", "twice.fastrec"):
        (line,) = [line for line in left_out if str(tmp_path / name) in line]
        assert line.split(": ", 1)[1]
    repository.scan()
    assert len(caplog.records) == 5  # once each


def test_models_outside_the_repository_are_not_served(start, engine_path, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copy(engine_path, repository / "inside")
    (repository / "outside").symlink_to(engine_path)
    (repository / "folder").symlink_to(engine_path.parent)
    server = start(repository)
    with grpcclient.InferenceServerClient(server.grpc) as client:
        assert [m.name for m in client.get_model_repository_index().models] == ["inside"]
        with pytest.raises(grpcclient.InferenceServerException, match="NOT_FOUND"):
            client.load_model("outside")


def test_an_altered_file_is_not_loaded(start, engine_path, tmp_path):
    shutil.copy(engine_path, tmp_path / "good")
    server = start(tmp_path)
    data = bytearray(engine_path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad").write_bytes(data)
    with grpcclient.InferenceServerClient(server.grpc) as client:
        with pytest.raises(grpcclient.InferenceServerException, match="altered"):
            client.load_model("bad")
        states = {m.name: (m.state, m.reason) for m in client.get_model_repository_index().models}
        assert states["good"] == ("READY", "")
        assert "altered" in states["bad"][1]


def test_a_checkpoint_is_compiled_by_another_process(start, tmp_path):
    model = ranker(4)
    fastrec.save(model, tmp_path / "my-ranker")
    server = start(tmp_path / "my-ranker", cache=tmp_path / "cache")
    request = request_of()
    with grpcclient.InferenceServerClient(server.grpc) as client:
        scores = client.infer("my-ranker", inputs(grpcclient, request)).as_numpy("scores")
    compiled = list((tmp_path / "cache").iterdir())
    assert len(compiled) == 1
    assert np.array_equal(scores, load_engine(compiled[0])(*request.values()))


def test_what_cannot_be_served_says_so(start, tmp_path):
    with pytest.raises(ArtifactError, match="no such file"):
        start(tmp_path / "none")
    with pytest.raises(ArtifactError, match="holds no engine"):
        start(tmp_path)
    with pytest.raises(ArgumentError, match="at least one of gRPC and HTTP"):
        ServerOptions(grpc_port=None, http_port=None)
