"""Every backend that can run here gives torch's answers, refuses bad input and goes on after it."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastrec
from fastrec.errors import (
    ArgumentError,
    BackendError,
    DtypeError,
    FastrecError,
    IdRangeError,
    MissingDependencyError,
    ShapeError,
)
from fastrec.measure.timing import Tolerance, correctness_gate
from fastrec.models import Ranker, RankerConfig
from fastrec.nn import Int8Embedding, SparseInt8Linear
from fastrec.runtime import BACKENDS, Engine, available_backends
from fastrec.runtime import compile as compile_engine
from fastrec.runtime.backends import onnxruntime as onnxruntime_backend

REASONS = available_backends()
FP32 = [name for name in BACKENDS if name not in ("torch_compile", "qnn")]
REDUCED = [
    ("torch", "bf16"),
    ("torch", "int8"),
    ("onnxruntime", "int8"),
    ("litert", "fp16"),
    ("litert", "int8"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
]


def need(backend: str) -> None:
    if REASONS[backend] is not None:
        pytest.skip(REASONS[backend])


@pytest.fixture(scope="module")
def engines(ranker):
    """(backend, precision) -> an engine on two threads, built once from a request of one row."""
    from fastrec.exporters.model_spec import spec_of

    built: dict[tuple[str, str | None], Engine] = {}
    spec = spec_of(ranker, ())

    def get(backend: str, precision: str | None = None) -> Engine:
        need(backend)
        if (backend, precision) not in built:
            built[backend, precision] = compile_engine(
                ranker,
                spec.sample({"m": 16}, seed=99),
                backend,
                2,
                precision=precision,
                calibration=[spec.sample({"B": 8, "m": 16}, seed=s) for s in range(4)],
            )
        return built[backend, precision]

    yield get
    for engine in built.values():
        engine.close()


def quantised(model: nn.Module) -> nn.Module:
    """A copy of the ranker with an int8 tower and item table."""
    model = copy.deepcopy(model)
    model.item_embedding = Int8Embedding.from_float(model.item_embedding)
    for i, layer in enumerate(model.tower):
        if isinstance(layer, nn.Linear):
            model.tower[i] = SparseInt8Linear.from_float(
                layer, calibration=[torch.linspace(-4, 4, layer.in_features)[None]]
            )
    return model


@pytest.mark.parametrize("backend", FP32)
@pytest.mark.parametrize("batch", [1, 3])
def test_fp32_engines_agree_with_torch(engines, request_of, expected, backend, batch):
    engine = engines(backend)
    assert (engine.backend, engine.precision, engine.threads) == (backend, "fp32", 2)
    for seed, length in enumerate((0, 1, 7, 12)):
        request = request_of(batch, seed)
        request[3][:] = length
        scores = engine(*request)
        assert scores.dtype == np.float32
        wanted = expected(request)
        # Some 12 dependent layers of sums of at most 48 products: sqrt(48) * 2^-24 each, 5e-6 in
        # all; the gate allows 1e-4 of the largest score.
        correctness_gate(wanted, scores, Tolerance.for_precision("fp32")).require(backend)


@pytest.mark.parametrize(("backend", "precision"), REDUCED)
def test_reduced_precision_keeps_most_of_the_top_ten(
    engines, request_of, expected, backend, precision
):
    engine = engines(backend, precision)
    assert engine.precision == precision
    request = request_of(3, 5)
    gate = correctness_gate(expected(request), engine(*request), Tolerance.for_precision(precision))
    assert gate.passed, gate
    assert gate.top_10 >= 0.8
    assert gate.max_abs_error > 0


def test_torch_compile_agrees(request_of):
    need("torch_compile")
    torch.manual_seed(0)
    # Compiling C++ takes seconds for every kind of layer: one of each is enough.
    config = RankerConfig(
        n_items=300,
        n_categories=30,
        history_length=12,
        d=16,
        n_heads=2,
        ffn=16,
        n_blocks=1,
        tower=(16,),
    )
    model = Ranker(config).eval()
    with compile_engine(model, request_of(1), "torch_compile", 2) as engine:
        request = request_of(1, 7)
        with torch.inference_mode():
            wanted = model(*map(torch.from_numpy, request)).numpy()
        gate = correctness_gate(wanted, engine(*request), Tolerance.for_precision("fp32"))
        gate.require("torch_compile")
        assert "freezing" in engine.describe()[0]["setting"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_runs_a_16_bit_model_as_one_plan(ranker, request_of, dtype, tmp_path):
    inputs = tuple(map(torch.from_numpy, request_of(5)))
    student = copy.deepcopy(ranker).to(dtype)
    engine = compile_engine(student, inputs, "native", 2, fallback="error")
    assert engine.precision == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    with torch.inference_mode():
        exact = copy.deepcopy(student).float()(*inputs)
        torchs = student(*inputs).float()
    # Activations stay float32 between layers: no further off than torch, which rounds them all
    # (twice, as one request's largest errors are a matter of luck too).
    assert (engine(*inputs) - exact).abs().max() <= 2 * (torchs - exact).abs().max()
    engine.save(tmp_path / "student.fastrec")
    loaded = fastrec.runtime.load_engine(tmp_path / "student.fastrec")
    assert loaded.precision == engine.precision
    np.testing.assert_array_equal(loaded(*request_of(5)), engine(*inputs).numpy())


def test_a_cpu_without_bf16_products_runs_a_bf16_model_in_float32(ranker, request_of):
    inputs = tuple(map(torch.from_numpy, request_of(3)))
    student = copy.deepcopy(ranker).to(torch.bfloat16)
    with fastrec.kernels.force_isa("scalar"):
        engine = compile_engine(student, inputs, "native", 1, fallback="error")
        twin = compile_engine(copy.deepcopy(student).float(), inputs, "native", 1)
        assert torch.equal(engine(*inputs), twin(*inputs))


@pytest.mark.parametrize(
    ("dtype", "asked", "message"),
    [
        (torch.bfloat16, "fp32", "this one is bf16"),
        (torch.float32, "bf16", "model.to\\(torch.bfloat16\\) makes it so"),
        (torch.float32, "fp16", "model.half\\(\\) makes it so"),
    ],
)
def test_native_changes_no_precision(ranker, request_of, dtype, asked, message):
    model = copy.deepcopy(ranker).to(dtype)
    with pytest.raises(BackendError, match=message):
        compile_engine(model, request_of(1), "native", 1, precision=asked)


@pytest.mark.parametrize(("precision", "batch"), [("fp32", 3), ("bf16", 1)])
def test_torch_compile_in_bf16_and_at_other_batches(ranker, request_of, expected, precision, batch):
    need("torch_compile")
    with compile_engine(ranker, request_of(1), "torch_compile", 2, precision=precision) as engine:
        request = request_of(batch, 7)
        gate = correctness_gate(
            expected(request), engine(*request), Tolerance.for_precision(precision)
        )
        gate.require("torch_compile")


@pytest.mark.parametrize("backend", FP32)
def test_tensors_in_tensor_out_and_the_answer_is_the_callers_own(engines, request_of, backend):
    engine = engines(backend)
    request = request_of(2, 1)
    tensors = [torch.from_numpy(a) for a in request]
    first = engine(*tensors)
    assert isinstance(first, torch.Tensor)
    kept = first.clone()
    engine(*[torch.from_numpy(a) for a in request_of(2, 2)])
    assert torch.equal(first, kept)
    arrays = engine(*request)
    assert isinstance(arrays, np.ndarray)
    np.testing.assert_allclose(arrays, kept.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FP32)
def test_an_engine_goes_on_after_a_bad_request(engines, request_of, expected, backend):
    engine = engines(backend)
    good = request_of(1, 3)
    bad = [a.copy() for a in good]
    bad[4][0, 0] = 300
    for broken, error in (
        (bad, IdRangeError),
        (good[:4], ArgumentError),
        ([a.astype(np.int32) for a in good], DtypeError),
        ([good[0][0], *good[1:]], ShapeError),
    ):
        with pytest.raises(error):
            engine(*broken)
    np.testing.assert_allclose(engine(*good), expected(good), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FP32)
def test_read_only_arrays_are_fine(engines, request_of, expected, backend):
    request = request_of(1, 4)
    wanted = expected(request)
    for array in request:
        array.setflags(write=False)
    np.testing.assert_allclose(engines(backend)(*request), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_exported_engines_keep_the_example_sizes(engines, request_of, backend):
    with pytest.raises(ShapeError, match=r"item: expected shape \[B, 12\]"):
        engines(backend)(*request_of(1, length=5))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_torch_engines_take_any_history(engines, request_of, expected, backend):
    request = request_of(2, length=5)
    np.testing.assert_allclose(engines(backend)(*request), expected(request), rtol=1e-4, atol=1e-4)


def test_a_closed_engine_says_so(ranker, request_of):
    engine = compile_engine(ranker, request_of(1), "torch")
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine(*request_of(1))


def test_thread_counts_are_put_back(engines, request_of):
    before = torch.get_num_threads()
    engines("torch")(*request_of(1))
    engines("native")(*request_of(1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_throughput_counts_requests(engines, request_of, backend):
    rate = engines(backend).throughput([request_of(1, s) for s in range(3)], seconds=0.2)
    assert rate > 1
    with pytest.raises(ArgumentError, match="requests"):
        engines(backend).throughput([])


def test_native_runs_a_quantised_model_as_it_is(ranker, request_of, expected):
    model = quantised(ranker)
    request = request_of(3, 8)
    with compile_engine(model, request_of(1), "native", 2) as engine:
        assert engine.precision == "int8"
        with torch.inference_mode():
            own = model(*map(torch.from_numpy, request)).numpy()
        # The same int8 model: only the last bits of a float sum may turn a rounding.
        correctness_gate(own, engine(*request), Tolerance(noise=0.1)).require("native")
        rows = {row["module"]: row for row in engine.describe() if "module" in row}
    tower = rows["tower.0"]
    assert tower["op"] == "sparse_int8_linear"
    # m rows x 48 inputs x 32 outputs, every group kept
    assert tower["macs"] == 16 * 48 * 32
    assert tower["density"] == 1
    assert tower["bytes"] > 48 * 32
    assert all(row["why"] for row in rows.values())
    shares = [row for row in engine.describe() if row["op"] == "choice"]
    assert sum(row["chosen"] for row in shares) == 1
    assert rows["item_embedding"]["op"] == "int8_embedding"
    # Scores and context of 16 candidates over the events of the example's one user, d = 16.
    assert rows["cross_attention"]["macs"] == 2 * 16 * request_of(1)[3].item() * 16


def test_auto_explains_its_choice(ranker, request_of, expected, monkeypatch):
    # torch.compile takes long to build; what it would add is tested above.
    monkeypatch.setattr(
        "fastrec.runtime.backends.torch_compile.can_run", lambda: "not in this test"
    )
    request = request_of(2, 9)
    with fastrec.compile(ranker, request, threads=1) as engine:
        assert engine.backend in FP32
        np.testing.assert_allclose(engine(*request), expected(request), rtol=1e-4, atol=1e-4)
        rows = {row["setting"]: row for row in engine.describe() if row["op"] == "choice"}
    assert rows[engine.backend]["chosen"]
    assert sum(rows[name]["chosen"] for name in BACKENDS) == 1
    assert rows["torch_compile"]["why"].endswith("not in this test")
    times = [rows[name]["p50_ms"] for name in BACKENDS if rows[name]["p50_ms"] is not None]
    assert rows[engine.backend]["p50_ms"] == min(times)


def test_auto_never_picks_wrong_answers(ranker, request_of, monkeypatch):
    class Wrong(Engine):
        def _run(self, arrays):
            return np.zeros(arrays[4].shape, np.float32)

    def build(model, examples, options):
        return Wrong(
            backend="onnxruntime",
            precision="fp32",
            threads=1,
            spec=options.spec,
            rows=[],
            versions={},
        )

    monkeypatch.setattr(onnxruntime_backend, "build", build)
    for name in ("torch_eager", "torch_compile", "openvino"):
        monkeypatch.setattr(f"fastrec.runtime.backends.{name}.can_run", lambda: "not in this test")
    engine = compile_engine(ranker, request_of(1))
    assert engine.backend == "native"
    assert any("disagrees with torch" in row["why"] for row in engine.describe())


def test_the_model_is_left_as_it_was(ranker, request_of):
    model = copy.deepcopy(ranker).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for backend, precision in (("torch", "int8"), ("torch", "bf16"), ("native", None)):
        compile_engine(model, request_of(1), backend, precision=precision).close()
    assert model.training
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "tensorflow"}, BackendError, "expected one of auto, native, openvino"),
        ({"precision": "fp8"}, ArgumentError, "precision: expected one of"),
        ({"threads": 0}, ArgumentError, "threads"),
        (
            {"backend": "onnxruntime", "precision": "bf16"},
            BackendError,
            "'onnxruntime' has no bf16: it has fp32, int8",
        ),
        (
            {"backend": "native", "precision": "int8"},
            BackendError,
            "holds no int8 module: call fastrec.quantize_",
        ),
        ({"settings": {"speed": "high"}}, ArgumentError, "settings"),
        (
            {"backend": "openvino", "settings": {"shapes": "round"}},
            ArgumentError,
            r"settings\['shapes'\]",
        ),
    ],
)
def test_bad_arguments_of_compile(ranker, request_of, arguments, error, message):
    with pytest.raises(error, match=message):
        compile_engine(ranker, request_of(1), **{"backend": "torch", **arguments})


def test_bad_models_and_examples(ranker, request_of):
    with pytest.raises(DtypeError, match="model"):
        compile_engine(lambda x: x, request_of(1), "torch")
    with pytest.raises(DtypeError, match="example_inputs"):
        compile_engine(ranker, 5, "torch")
    request = request_of(1)
    request[4][0, 0] = -3
    with pytest.raises(IdRangeError, match="cand_item"):
        compile_engine(ranker, request, "torch")

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    with compile_engine(Pair(), (torch.zeros(1, 2),), "torch") as engine:
        first, second = engine(torch.ones(1, 2))
        assert first.tolist() == second.tolist() == [[1, 1]]

    with pytest.raises(ArgumentError, match="example_inputs: expected inputs that the model's own"):
        compile_engine(nn.Embedding(3, 2), (torch.tensor([[5]]),), "torch")


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_int8_modules_cannot_be_quantised_again(ranker, request_of, backend):
    need(backend)
    with pytest.raises(FastrecError, match="item_embedding"):
        compile_engine(quantised(ranker), request_of(1), backend, precision="int8")


@pytest.mark.parametrize(("backend", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_package_is_named_with_its_extra(ranker, request_of, monkeypatch, backend, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == backend else find(name, *a)
    )
    assert backend in available_backends()[backend]
    with pytest.raises(MissingDependencyError, match=rf"fastrec-kernels\[{extra}\]"):
        compile_engine(ranker, request_of(1), backend)


def test_any_torch_model_with_float_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(4, 6)
    with torch.inference_mode():
        wanted = model(x)
    for backend in FP32:
        need(backend)
        with compile_engine(model, (x,), backend, 1) as engine:
            torch.testing.assert_close(engine(x), wanted, rtol=1e-4, atol=1e-5)
            with pytest.raises(DtypeError, match="input: expected float32, got float64"):
                engine(x.double())
    with compile_engine(model, (x,), "torch", 1, precision="bf16") as engine:
        torch.testing.assert_close(engine(x), wanted, rtol=0.05, atol=0.02)


def test_a_model_in_training_with_an_old_weight_norm_is_compiled() -> None:
    """Its weight is the result of a computation, which torch does not copy by itself."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4)).train()
    x = torch.randn(3, 8)
    with fastrec.compile(model, (x,), "torch", 1) as engine:
        torch.testing.assert_close(engine(x), model(x).detach(), rtol=1e-5, atol=1e-6)
    assert model.training
