"""Execution providers by name and never another in their place; bindings, threads, warm-up."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import fastrec
from fastrec.errors import ArgumentError, ArtifactError, BackendError
from fastrec.exporters.onnx import session as sessions
from fastrec.exporters.onnx.session import PROVIDERS, SessionSettings, open_session
from fastrec.runtime import artifact, load_engine

ABSENT = [name for name in PROVIDERS if sessions.provider_reason(name) is not None]


def compiled(model: Any, request: Any, **settings: Any) -> Any:
    return fastrec.compile(model, request, "onnxruntime", 2, settings=settings)


@pytest.fixture(scope="module")
def exported(ranker, tmp_path_factory):
    from fastrec.exporters.model_spec import spec_of

    examples = spec_of(ranker, ()).sample({"m": 16})
    return fastrec.export(ranker, tmp_path_factory.mktemp("onnx") / "model.onnx", examples)


@pytest.mark.parametrize("provider", ABSENT)
def test_a_missing_provider_is_an_error_that_lists_what_is_there(ranker, request_of, provider):
    with pytest.raises(BackendError) as raised:
        compiled(ranker, request_of(1), provider=provider)
    message = str(raised.value)
    assert f"provider {provider!r}" in message
    if "finds no device" not in message:
        assert PROVIDERS[provider][1] in message
        assert re.search(rf"onnxruntime {re.escape(ort.__version__)}(, .*)? with ", message)
        assert "CPUExecutionProvider" in message


def test_an_unknown_provider_names_the_known_ones(ranker, request_of):
    with pytest.raises(ArgumentError, match=r"one of \('cpu', 'cuda', 'tensorrt'"):
        compiled(ranker, request_of(1), provider="gpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"spinning": True},
        {"inter_op": 0},
        {"inter_op": "2"},
        {"io_binding": "yes"},
        {"cpu_nodes": "some"},
        {"provider_options": ["a"]},
        {"affinity": "1"},
    ],
    ids=str,
)
def test_bad_settings(ranker, request_of, settings):
    with pytest.raises(ArgumentError, match="settings"):
        compiled(ranker, request_of(1), **settings)


class Session:
    """A session whose provider did not load: ONNX Runtime has gone on with the CPU."""

    given: Any = None
    held = ("CPUExecutionProvider",)

    def __init__(self, path: str, options: Any, providers: Any) -> None:
        Session.given, self.options = providers, options
        self.fallback = True

    def get_providers(self) -> list[str]:
        return list(self.held)

    def disable_fallback(self) -> None:
        self.fallback = False


@pytest.fixture
def cuda(monkeypatch):
    """An ONNX Runtime that lists CUDA."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    return SessionSettings("cuda")


def test_a_provider_that_falls_back_silently_is_an_error(cuda, exported):
    with pytest.raises(BackendError, match="CUDAExecutionProvider did not load: the session has"):
        open_session(exported, threads=1, settings=cuda)


def test_a_provider_that_loads(cuda, exported, monkeypatch):
    monkeypatch.setattr(Session, "held", ("CUDAExecutionProvider", "CPUExecutionProvider"))
    session = open_session(exported, threads=3, settings=cuda)
    assert not session.fallback  # nor may it fall back later
    assert Session.given == [("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})]
    assert session.options.intra_op_num_threads == 3

    def entry(session: Any) -> str:
        return session.options.get_session_config_entry("session.disable_cpu_ep_fallback")

    assert entry(session) == "0"
    alone = SessionSettings("cuda", {"device_id": "1"}, cpu_nodes=False)
    session = open_session(exported, threads=1, settings=alone)
    assert Session.given == [("CUDAExecutionProvider", {"device_id": "1"})]
    assert entry(session) == "1"


@pytest.mark.parametrize("devices", [0, 1])
def test_a_provider_that_is_a_package_of_its_own(exported, monkeypatch, devices):
    plugin = ModuleType("onnxruntime_qnn")
    plugin.get_ep_name = lambda: "QNNExecutionProvider"  # type: ignore[attr-defined]
    plugin.get_library_path = lambda: "libqnn.so"  # type: ignore[attr-defined]
    plugin.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", plugin)
    monkeypatch.setattr(sessions, "_registered", set())
    loaded: list[Any] = []
    npu = SimpleNamespace(ep_name="QNNExecutionProvider", device=SimpleNamespace(type="Type.NPU"))
    cpu = SimpleNamespace(ep_name="CPUExecutionProvider", device=SimpleNamespace(type="Type.CPU"))
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *a: loaded.append(a))
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [cpu, npu][: 1 + devices])
    added: list[Any] = []

    class Options(ort.SessionOptions):
        def add_provider_for_devices(self, found: Any, options: Any) -> None:
            added.append((found, options))

    monkeypatch.setattr(ort, "SessionOptions", Options)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(Session, "held", ("QNNExecutionProvider", "CPUExecutionProvider"))
    settings = SessionSettings("qnn", {"htp_performance_mode": "burst"})
    if not devices:
        with pytest.raises(BackendError, match="finds no device that it supports among CPU"):
            open_session(exported, threads=1, settings=settings)
        return
    for _ in range(2):
        open_session(exported, threads=1, settings=settings)
    assert loaded == [("QNNExecutionProvider", "libqnn.so")]
    assert added == [([npu], {"htp_performance_mode": "burst"})] * 2
    assert Session.given is None


@pytest.mark.parametrize(
    "settings",
    [
        {"io_binding": "on"},
        {"spinning": "off"},
        {"inter_op": 2},
        {"io_binding": "on", "free_sizes": "all"},
    ],
    ids=str,
)
def test_settings_change_no_answer_and_survive_a_file(
    ranker, request_of, expected, tmp_path, settings
):
    request = request_of(3, 5)
    with compiled(ranker, request_of(2), **settings) as engine:
        np.testing.assert_allclose(engine(*request), expected(request), rtol=1e-4, atol=1e-4)
        kept = engine(*request)
        engine(*request_of(3, 6))
        np.testing.assert_allclose(kept, expected(request), rtol=1e-4, atol=1e-4)
        engine.save(tmp_path / "engine")
        rows, before = engine.describe(), engine._settings
    with load_engine(tmp_path / "engine") as engine:
        assert engine._settings == before
        np.testing.assert_array_equal(engine(*request), kept)
    binding = next(row for row in rows if row["setting"] == "IO binding")
    assert binding["chosen"] == ("io_binding" in settings)
    idle = "sleep" if "spinning" in settings else "spin"
    assert f"idle workers {idle}" in rows[0]["setting"]


def test_sleeping_workers_leave_the_core(ranker, request_of):
    with compiled(ranker, request_of(1), spinning="off") as engine:
        assert engine.spin_s == 0
    with compiled(ranker, request_of(1)) as engine:
        assert engine.spin_s > 0


def test_a_build_and_a_load_warm_the_session_up(ranker, request_of, tmp_path, monkeypatch):
    from fastrec.runtime.backends.onnxruntime import OnnxRuntimeEngine

    calls: list[Any] = []
    run = OnnxRuntimeEngine._run

    def counted(self: Any, arrays: Any) -> Any:
        calls.append([a.shape for a in arrays])
        return run(self, arrays)

    monkeypatch.setattr(OnnxRuntimeEngine, "_run", counted)
    with compiled(ranker, request_of(2)) as engine:
        # Two, and the comparisons with torch: on the examples and on three inputs unlike them.
        assert len(calls) == 6
        assert calls[:3] == [[a.shape for a in request_of(2)]] * 3
        engine.save(tmp_path / "engine")
    calls.clear()
    load_engine(tmp_path / "engine").close()
    assert len(calls) == 2
    assert calls[0] == [a.shape for a in request_of(2)]


def test_its_own_quantiser_is_for_the_cpu(ranker, request_of, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BackendError, match="dynamic quantiser is for the CPU"):
        fastrec.compile(
            ranker,
            request_of(1),
            "onnxruntime",
            precision="int8",
            settings={"provider": "cuda"},
        )


@pytest.mark.parametrize("altered", [{"provider": "abacus"}, {"cores": 3}])
def test_foreign_session_settings_in_a_file(exported, ranker, request_of, tmp_path, altered):
    with compiled(ranker, request_of(1)) as engine:
        header = engine._header() | {"settings": {"session": altered}}
    artifact.write(
        tmp_path / "bad",
        header,
        lambda folder: (folder / "model.onnx").write_bytes(exported.read_bytes()),
    )
    with pytest.raises(ArtifactError, match="session settings"):
        load_engine(tmp_path / "bad")


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x01" * 40])
def test_a_file_that_is_no_model(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot read"):
        open_session(tmp_path / "model.onnx", threads=1)
