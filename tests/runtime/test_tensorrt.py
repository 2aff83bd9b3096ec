"""The TensorRT backend on stand-ins for the package and the GPU: what is built, run and refused.

The stand-ins take what the real package takes (``tensorrt_surface.txt``) and compute the network on
the CPU, so that answers are held against torch's.
"""

from __future__ import annotations

import copy
import enum
import importlib.util
import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
import torch

import fastrec
from fastrec.errors import (
    ArgumentError,
    ArtifactError,
    BackendError,
    MissingDependencyError,
    ShapeError,
)
from fastrec.exporters.model_spec import spec_of
from fastrec.exporters.onnx.export import write_onnx
from fastrec.exporters.onnx.symmetric import symmetric_int8
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.runtime import available_backends, load_engine
from fastrec.runtime.backends import tensorrt as backend

SURFACE = Path(__file__).parent / "tensorrt_surface.txt"


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """``write_onnx`` that exports a model once: it takes seconds."""
    folder, known = tmp_path_factory.mktemp("exports"), {}

    def write(model: Any, path: Path, examples: Any, **options: Any) -> None:
        key = (id(model), tuple(t.shape for t in examples), repr(options))
        if key not in known:
            file = folder / f"{len(known)}.onnx"
            write_onnx(model, file, examples, **options)
            known[key] = model, file  # the model is kept, and with it its id
        shutil.copyfile(known[key][1], path)

    return write


@pytest.fixture
def trt(monkeypatch, tmp_path, exports):
    """The stand-ins in place of the packages, and a cache of the test's own."""
    monkeypatch.setattr("fastrec.exporters.onnx.export.write_onnx", exports)
    modules = fake_tensorrt.cupy_modules() | {"tensorrt": fake_tensorrt.tensorrt_module()}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path / "cache"))
    fake_tensorrt.built.clear()
    fake_tensorrt.graphs.clear()
    return modules["tensorrt"]


@pytest.fixture(scope="module")
def int8(ranker):
    model = copy.deepcopy(ranker)
    spec = spec_of(model, ())
    drawn = [tuple(map(torch.from_numpy, spec.sample({"B": 4, "m": 16}, seed=s))) for s in range(3)]
    fastrec.quantize_(model, fastrec.Int8(), calibration=drawn)
    return model


def compiled(model: Any, request: Any, precision: str | None = None, **settings: Any) -> Any:
    return fastrec.compile(model, request, "tensorrt", 1, precision=precision, settings=settings)


def rows(engine: Any) -> dict[str, dict[str, Any]]:
    return {row["setting"].split(" ")[0]: row for row in engine.describe()}


def test_fp32_answers_like_torch_at_every_size_of_the_profile(trt, ranker, request_of, expected):
    with compiled(ranker, request_of(2)) as engine:
        assert (engine.backend, engine.precision) == ("tensorrt", "fp32")
        for batch, length in ((1, 1), (2, 12), (7, 5), (64, 12)):
            request = request_of(batch, seed=batch, length=length)
            gate = correctness_gate(
                expected(request), engine(*request), Tolerance.for_precision("fp32")
            )
            gate.require("the stand-in")
        first = engine(*request_of(2, 1))
        kept = first.copy()
        engine(*request_of(2, 2))
        np.testing.assert_array_equal(first, kept)


def test_what_was_quantised_runs_as_symmetric_int8(trt, int8, request_of):
    with compiled(int8, request_of(2)) as engine:
        assert engine.precision == "int8"
        request = request_of(5, 3)
        with torch.inference_mode():
            wanted = int8(*map(torch.from_numpy, request)).numpy()
        correctness_gate(wanted, engine(*request), Tolerance(noise=0.1)).require("the stand-in")
        assert "symmetric int8" in rows(engine)["strongly"]["why"]


def test_the_stand_in_refuses_uint8_as_tensorrt_does(trt, int8, request_of, monkeypatch):
    monkeypatch.setattr("fastrec.exporters.onnx.symmetric.symmetric_int8", lambda proto: 0)
    with pytest.raises(BackendError, match=r"cannot read the model: .*zero point .* of uint8"):
        compiled(int8, request_of(2))


def test_symmetric_int8_gives_the_integers_of_the_export(int8, request_of, tmp_path):
    file = tmp_path / "model.onnx"
    write_onnx(int8, file, tuple(map(torch.from_numpy, request_of(2))))
    proto = onnx.load(file)
    quantisers = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"]
    assert symmetric_int8(proto) == len(quantisers) > 10
    onnx.checker.check_model(proto, full_check=True)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    both = [
        ort.InferenceSession(m, options, providers=["CPUExecutionProvider"])
        for m in (file.read_bytes(), proto.SerializeToString())
    ]
    names = spec_of(int8, ()).names
    for seed in range(5):
        feed = dict(zip(names, request_of(4, seed), strict=True))
        ours, theirs = (session.run(None, feed)[0] for session in both)
        # One integer that rounds the other way moves a score by some 1e-3; float noise is 1e-6.
        assert (np.abs(ours - theirs) < 1e-5).mean() > 0.95
        np.testing.assert_allclose(ours, theirs, atol=0.05)


def test_fp16_holds_halves(trt, ranker, request_of, expected):
    with compiled(ranker, request_of(2), "fp16") as engine:
        request = request_of(3, 4)
        correctness_gate(
            expected(request), engine(*request), Tolerance.for_precision("fp16")
        ).require("the stand-in")
        halves = engine._cuda_engine._model.graph.initializer
        kinds = {t.data_type for t in halves}
        assert onnx.TensorProto.FLOAT16 in kinds
        assert onnx.TensorProto.FLOAT not in kinds


def test_the_builder_is_told_what_was_asked(trt, ranker, request_of):
    profile = {"B": (1, 2, 4), "L": (3, 12, 12), "m": (16, 16, 32)}
    compiled(ranker, request_of(2), profile=profile, tf32=True, workspace=64, level=1).close()
    compiled(ranker, request_of(2), sparse_weights="on").close()
    first, second = fake_tensorrt.built
    flags, pools = fake_tensorrt.BuilderFlag, fake_tensorrt.MemoryPoolType
    assert first._flags == {flags.TF32}
    assert second._flags == {flags.SPARSE_WEIGHTS}
    assert first._limits == {pools.WORKSPACE: 64 << 20}
    assert first.builder_optimization_level == 1
    (ranges,) = (p._ranges for p in first._profiles)
    assert ranges["item"] == [(1, 3), (2, 12), (4, 12)]
    assert ranges["length"] == [(1,), (2,), (4,)]
    assert ranges["cand_item"] == [(1, 16), (2, 16), (4, 32)]


def test_sparse_kernels_where_every_weight_is_two_of_four(trt, request_of, ranker):
    model = copy.deepcopy(ranker)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.view(len(module.weight), -1, 4)[..., 1::2] = 0
    for name, chosen in (("auto", True), ("off", False)):
        with compiled(model, request_of(2), sparse_weights=name) as engine:
            row = rows(engine)["2:4"]
            assert row["chosen"] is chosen, row


def test_shapes_beyond_the_profile_are_refused(trt, ranker, request_of, expected):
    profile = {"B": (1, 2, 4), "L": (3, 12, 12)}
    with compiled(ranker, request_of(2), profile=profile) as engine:
        for bad in (request_of(5), request_of(1, length=2)):
            with pytest.raises(ShapeError, match=r"in (1\.\.4|3\.\.12)"):
                engine(*bad)
        good = request_of(4)
        np.testing.assert_allclose(engine(*good), expected(good), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"profile": {"Q": (1, 2, 3)}}, "sizes among"),
        ({"profile": {"B": (2, 1, 3)}}, "ascending"),
        ({"profile": {"B": (0, 1, 3)}}, "positive"),
        ({"profile": {"B": 3}}, "ascending"),
        ({"tf32": 1}, "True or False"),
        ({"level": 6}, r"integer in 0\.\.5"),
        ({"workspace": "much"}, "integer"),
        ({"cuda_graph": "maybe"}, "cuda_graph"),
        ({"sparsity": True}, "keys among"),
    ],
)
def test_bad_settings(trt, ranker, request_of, settings, match):
    with pytest.raises(ArgumentError, match=match):
        compiled(ranker, request_of(2), **settings)


def test_precisions_that_do_not_fit_the_model(trt, ranker, int8, request_of):
    with pytest.raises(BackendError, match="holds no int8 module"):
        compiled(ranker, request_of(2), "int8")
    with pytest.raises(BackendError, match="which is int8"):
        compiled(int8, request_of(2), "fp16")


def test_a_build_that_fails_says_why(trt, ranker, request_of):
    with pytest.raises(BackendError, match="no kernel fits level 5"):
        compiled(ranker, request_of(2), level=5)


def test_plans_and_timings_come_from_the_cache(trt, ranker, request_of, tmp_path):
    def source(**settings: Any) -> str:
        with compiled(ranker, request_of(2), **settings) as engine:
            return str(rows(engine)["plan"]["why"])

    assert "timings measured anew" in source()
    assert "from the cache" in source()
    assert "timings of earlier builds" in source(workspace=2)
    assert len(fake_tensorrt.built) == 2
    with fake_tensorrt.another_gpu("Another GPU"):
        assert "timings measured anew" in source()  # neither plan nor timings of the first
    for file in (tmp_path / "cache" / "tensorrt").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert "timings measured anew" in source()  # cut short: built again
    assert "from the cache" in source()


def test_foreign_timings_are_not_used(trt, ranker, request_of, tmp_path):
    from fastrec.runtime.cache import write_checked

    compiled(ranker, request_of(2)).close()
    for file in (tmp_path / "cache" / "tensorrt").glob("timings-*"):
        assert write_checked(file, b"of another version")
    with compiled(ranker, request_of(2), workspace=3) as engine:
        assert "timings measured anew" in rows(engine)["plan"]["why"]


def test_no_cache_folder_is_no_error(trt, ranker, request_of, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path / "file"))
    with compiled(ranker, request_of(2)) as engine:
        assert "built here" in rows(engine)["plan"]["why"]


def test_one_graph_a_shape(trt, ranker, request_of, expected):
    with compiled(ranker, request_of(2)) as engine:
        before = len(fake_tensorrt.graphs)
        for _ in range(2):
            for batch in (1, 2, 3):
                engine(*request_of(batch))
        # fastrec.compile itself has called with the examples' batch and with one user.
        assert (before, len(fake_tensorrt.graphs)) == (2, 3)
        # Six copies in, one inference, one copy out.
        assert {len(work) for work in fake_tensorrt.graphs} == {8}
        for batch in range(1, 24):
            request = request_of(batch)
            np.testing.assert_allclose(engine(*request), expected(request), rtol=1e-4, atol=1e-4)
        assert len(engine._shapes) == backend._SHAPES


def test_without_graphs(trt, ranker, request_of, expected):
    request = request_of(2, 5)
    with compiled(ranker, request_of(2), cuda_graph="off") as engine:
        np.testing.assert_allclose(engine(*request), expected(request), rtol=1e-4, atol=1e-4)
        assert not fake_tensorrt.graphs


def test_a_call_that_cannot_be_captured_runs_and_says_so(
    trt, ranker, request_of, expected, monkeypatch
):
    def begin(self: Any) -> None:
        raise fake_tensorrt.CUDARuntimeError("cudaErrorStreamCaptureUnsupported")

    monkeypatch.setattr(fake_tensorrt.Stream, "begin_capture", begin)
    request = request_of(2, 5)
    with compiled(ranker, request_of(2)) as engine:
        np.testing.assert_allclose(engine(*request), expected(request), rtol=1e-4, atol=1e-4)
        refused = [r for r in engine.describe() if "cannot be captured" in r["why"]]
    # Once for each batch that fastrec.compile tried, and for the candidates of this request.
    assert len({row["setting"] for row in refused}) == len(refused) > 0
    assert not any(row["chosen"] for row in refused)


def test_save_and_load(trt, ranker, request_of, tmp_path, monkeypatch):
    request = request_of(3, 6)
    with compiled(ranker, request_of(2)) as engine:
        before = engine(*request)
        engine.save(tmp_path / "saved")
    with load_engine(tmp_path / "saved") as engine:
        np.testing.assert_array_equal(engine(*request), before)
        with pytest.raises(ShapeError):
            engine(*request_of(65))
    with (
        fake_tensorrt.another_gpu("Another GPU"),
        pytest.raises(BackendError, match=r"built for Stand-in GPU \(9.0\).* this is Another GPU"),
    ):
        load_engine(tmp_path / "saved")
    monkeypatch.setattr(trt, "__version__", "12.0.0")
    with pytest.raises(BackendError, match=r"this is .* TensorRT 12\.0\.0"):
        load_engine(tmp_path / "saved")
    monkeypatch.undo()
    with pytest.raises(BackendError, match="not installed"):
        load_engine(tmp_path / "saved")


def test_a_plan_that_is_none_is_refused(trt, ranker, request_of, tmp_path):
    from fastrec.runtime import artifact

    with compiled(ranker, request_of(2)) as engine:
        header = engine._header() | {
            "settings": {
                "gpu": engine._gpu,
                "tensorrt": fake_tensorrt.__version__,
                "cuda_graph": True,
            }
        }
    artifact.write(
        tmp_path / "bad", header, lambda folder: (folder / "model.plan").write_bytes(b"no plan")
    )
    with pytest.raises(ArtifactError, match="magic tag does not match"):
        load_engine(tmp_path / "bad")


def test_a_closed_engine_says_so(trt, ranker, request_of):
    engine = compiled(ranker, request_of(2))
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine(*request_of(2))


def test_why_it_cannot_run(trt, ranker, request_of, monkeypatch):
    assert backend.can_run() is None
    monkeypatch.setattr(trt, "__version__", "8.6.1")
    assert "8.6.1 is too old" in str(backend.can_run())
    monkeypatch.setattr(trt, "__version__", "11.4.0")
    for count, said in ((0, "CUDA sees no GPU"), (-1, "cudaErrorInsufficientDriver")):
        monkeypatch.setattr(fake_tensorrt.Gpu, "count", count)
        assert said in str(backend.can_run())
        with pytest.raises(BackendError, match=said):
            compiled(ranker, request_of(2))

    def broken() -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(backend, "_tensorrt", broken)
    assert "cannot be imported: libnvinfer" in str(backend.can_run())


def test_a_missing_package_is_named_with_its_extra(ranker, request_of):
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("tensorrt is installed here")
    assert "fastrec-kernels[tensorrt]" in str(available_backends()["tensorrt"])
    with pytest.raises(MissingDependencyError, match=r"fastrec-kernels\[tensorrt\]"):
        compiled(ranker, request_of(2))


# What the real package has: lines "Class.method(name: type, ...) -> type", "Class.name: property"
# (", read-only") and "Enum.NAME = value".
def _lines(name: str) -> list[str]:
    pattern = re.compile(rf"{re.escape(name)}(\(|:| = |$)")
    return [line for line in SURFACE.read_text().splitlines() if pattern.match(line)]


def _public(kind: type) -> list[str]:
    own = [n for n in vars(kind) if not n.startswith("_")]
    return own if issubclass(kind, enum.Enum) else [*own, "__init__"]


@pytest.mark.parametrize("kind", fake_tensorrt.TENSORRT, ids=lambda kind: kind.__name__)
def test_the_stand_in_has_nothing_that_tensorrt_has_not(kind: type) -> None:
    if issubclass(kind, enum.Enum):
        for member in kind:
            assert _lines(f"{kind.__name__}.{member.name}") == [
                f"{kind.__name__}.{member.name} = {member.value}"
            ]
        return
    constructed = bool(_lines(f"{kind.__name__}.__init__"))
    for name in _public(kind):
        if name == "__init__" and not constructed:
            continue  # only TensorRT itself makes these
        lines = _lines(f"{kind.__name__}.{name}")
        assert lines, f"tensorrt has no {kind.__name__}.{name}"
        value = inspect.getattr_static(kind, name)
        if isinstance(value, property):
            assert "property" in lines[0]
        elif inspect.isfunction(value):
            given = [p for p in inspect.signature(value).parameters if p != "self"]
            accepted = [re.findall(r"(\w+): [^,=)]+(=)?", line.split(" -> ")[0]) for line in lines]
            assert any(
                given == [name for name, _ in arguments[: len(given)]]
                and all(default for _, default in arguments[len(given) :])
                for arguments in accepted
            ), f"{kind.__name__}.{name}: {accepted}"
        elif inspect.ismemberdescriptor(value):  # set by the caller
            assert lines[0].endswith("property"), lines


def test_the_stand_in_has_what_cupy_has() -> None:
    pytest.importorskip(
        "cupy", reason="CuPy comes with fastrec-kernels[tensorrt] and fastrec-kernels[cuda]"
    )
    from cupy import cuda
    from cupy.cuda import runtime

    modules = fake_tensorrt.cupy_modules()
    for real, name in ((cuda, "cupy.cuda"), (runtime, "cupy.cuda.runtime")):
        for attribute in vars(modules[name]):
            if not attribute.startswith("__"):
                assert hasattr(real, attribute), f"{name} has no {attribute}"
    for real_kind, kind in ((cuda.Stream, fake_tensorrt.Stream), (cuda.Graph, fake_tensorrt.Graph)):
        for attribute in vars(kind):
            if not attribute.startswith("_") and attribute not in ("of", "enqueue"):
                assert hasattr(real_kind, attribute), f"{real_kind} has no {attribute}"
    assert runtime.memcpyHostToDevice == 1
    assert runtime.memcpyDeviceToHost == 2


def test_the_surface_is_that_of_the_package() -> None:
    trt = pytest.importorskip("tensorrt", reason="tensorrt comes with fastrec-kernels[tensorrt]")
    for line in SURFACE.read_text().splitlines():
        if not line.startswith("#"):
            owner: Any = trt
            for part in re.split(r"[(:= ]", line)[0].split("."):
                assert hasattr(owner, part), line
                owner = getattr(owner, part)
