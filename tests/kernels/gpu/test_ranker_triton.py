"""The whole ranker by ``backend="cuda"`` against torch: interpreted, or on a GPU."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastrec
from fastrec import env
from fastrec.errors import ArgumentError, BackendError, IdRangeError
from fastrec.exporters.model_spec import spec_of
from fastrec.models import EncoderConfig, Ranker, RankerConfig
from fastrec.runtime.backends import cuda

WHY_NOT = cuda.can_run()
runs = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}; TRITON_INTERPRET=1 needs none")
SMALL: dict[str, Any] = {
    "n_items": 300,
    "n_categories": 30,
    "history_length": 21,
    "d": 16,
    "category_dim": 8,
    "n_heads": 2,
    "ffn": 40,
    "tower": (48, 32, 33),
}
# (B, L, m): one of everything, tile edges, more users than a bucket of the examples'.
SIZES = [(1, 1, 1), (2, 21, 16), (3, 17, 33)]


def ranker(**changes: Any) -> Ranker:
    torch.manual_seed(0)
    return Ranker(RankerConfig(**{**SMALL, **changes})).eval()


def request(model: Ranker, sizes: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, ...]:
    drawn = spec_of(model, ()).sample(dict(zip("BLm", sizes, strict=True)), seed=seed)
    drawn[3][0] = 0  # a user without history
    if len(drawn[3]) > 1:
        drawn[3][1] = sizes[1]
    return tuple(map(torch.from_numpy, drawn))


def engine_of(model: Ranker, precision: str | None = None, **settings: Any) -> Any:
    examples = request(model, (2, 21, 16), seed=9)
    return fastrec.compile(model, examples, "cuda", precision=precision, settings=settings)


def scores(model: Ranker, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with torch.inference_mode():
        return model(*inputs)


def error(model: Ranker, engine: Any, sizes: tuple[int, int, int]) -> float:
    """Largest error, as a part of the largest score."""
    inputs = request(model, sizes)
    expected = scores(model, inputs)
    actual = engine(*inputs)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def model() -> Ranker:
    return ranker()


@pytest.fixture(scope="module")
def engine(model: Ranker) -> Any:
    """Of the model as it is, in float32."""
    return engine_of(model)


@runs
def test_one_engine_serves_all_sizes(model: Ranker, engine: Any) -> None:
    for sizes in SIZES:
        # Some twenty float32 layers of sums of up to 48 products: sqrt(20 * 48) * 2^-24 = 2e-6.
        assert error(model, engine, sizes) < 1e-5


@runs
@pytest.mark.parametrize(
    "changes",
    [
        {"n_blocks": 0},
        {"n_blocks": 3, "n_heads": 1, "ffn": 16},
        {"d": 40, "n_heads": 5, "tower": (32,)},
        {"item_dim": 4},
    ],
    ids=str,
)
def test_other_shapes_of_the_model(changes: dict[str, Any]) -> None:
    model = ranker(**changes)
    assert error(model, engine_of(model), (2, 20, 17)) < 1e-5


@runs
@pytest.mark.parametrize(("precision", "bits"), [("fp16", 11), ("bf16", 8)])
def test_half_precision(model: Ranker, precision: str, bits: int) -> None:
    engine = engine_of(model, precision)
    assert engine.precision == precision
    # Some twenty roundings of half a unit on the way, added up as random ones, of values up to
    # four times as large as the scores.
    assert error(model, engine, (3, 17, 33)) < 4 * 20**0.5 * 2.0**-bits


@runs
@pytest.mark.parametrize("tower", ["persistent", "layers"])
def test_int8_has_the_integers_of_the_quantised_model(tower: str) -> None:
    model = ranker()
    fastrec.quantize_(model, fastrec.Int8(), calibration=[request(model, (4, 21, 16), seed=1)])
    engine = engine_of(model, tower=tower)
    assert engine.precision == "int8"
    for sizes in SIZES:
        inputs = request(model, sizes)
        off = (engine(*inputs) - scores(model, inputs)).abs()
        # Same integers: what is left is float32 rounding. Floats of another order of summation
        # turn a rounding now and then: of few requests.
        assert float((off > 1e-5).float().mean()) < 0.05


@runs
@pytest.mark.parametrize("tower", ["persistent", "layers"])
def test_a_pruned_tower_skips_and_keeps_its_integers(tower: str) -> None:
    model = ranker(tower=(64, 96, 64))
    fastrec.prune_(model, fastrec.BlockPruning(sparsity=0.5), filter_fn=in_the_tower)
    fastrec.quantize_(model, fastrec.Int8(), calibration=[request(model, (4, 21, 16), seed=1)])
    engine = engine_of(model, tower=tower)
    skipped = []
    for sizes in SIZES:
        inputs = request(model, sizes)
        off = (engine(*inputs) - scores(model, inputs)).abs()
        assert float((off > 1e-5).float().mean()) < 0.05
        made = engine.launches(*engine._executor.bucket_of(sizes))
        towers = [launch for launch in made if launch.name.startswith("tower")]
        skipped.append(all(launch.options["SKIPS"] for launch in towers if launch.int8))
    # One candidate: less to read. Many: tiles of one panel read activations too often.
    assert skipped[0]
    assert not skipped[-1]


@runs
def test_the_tuned_tile_of_a_tower_is_taken_and_changes_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastrec.kernels import _tuning
    from fastrec.runtime.cuda import tuning

    model = ranker(tower=(64, 96, 64))
    fastrec.prune_(model, fastrec.BlockPruning(sparsity=0.5), filter_fn=in_the_tower)
    fastrec.quantize_(model, fastrec.Int8(), calibration=[request(model, (4, 21, 16), seed=1)])
    before = engine_of(model)
    monkeypatch.setenv("FASTREC_CACHE_DIR", str(tmp_path))
    kept = _tuning.Table("ranker_tower", "GPU", "source", ())
    monkeypatch.setattr(tuning, "table", lambda device: kept)
    tiles = tuning.possible(before._executor.weights.tower)
    assert len(set(tiles)) == len(tiles)
    assert {tile.skips for tile in tiles} == {False, True}
    # The last one wins; one is too large for the GPU.
    took = iter([1.0] * (len(tiles) - 2) + [0.5])

    def time_ms(call: Any) -> float:
        call()
        if (found := next(took, None)) is None:
            raise RuntimeError("out of resources")
        return found

    monkeypatch.setattr(_tuning, "device_time_ms", time_ms)
    said = tuning.tune_tower(before._executor, 1, 3)
    assert "500.0 us" in said
    assert str(tiles[-2]) in said
    after = engine_of(model)
    inputs = request(model, (1, 9, 3))
    assert str(after._executor.made(after._executor.bucket_of((1, 9, 3))).config) == str(tiles[-2])
    assert torch.equal(after(*inputs), before(*inputs))
    assert after._executor.made(after._executor.bucket_of((3, 9, 33))).config not in tiles[-2:]


def in_the_tower(module: torch.nn.Module, name: str) -> bool:
    return name.startswith("tower")


@runs
def test_int8_to_the_last_layer_and_in_the_tables() -> None:
    from fastrec.nn import Int8Embedding, SparseInt8Linear

    model = ranker()
    reference = copy.deepcopy(model)
    model.item_embedding = Int8Embedding.from_float(model.item_embedding)
    for i, layer in enumerate(model.tower):
        if isinstance(layer, torch.nn.Linear):
            values = torch.linspace(-4, 4, layer.in_features)[None]
            model.tower[i] = SparseInt8Linear.from_float(layer, calibration=[values])
    assert error(model, engine_of(model), (3, 17, 33)) < 1e-5
    assert error(reference, engine_of(model), (3, 17, 33)) > 1e-5  # it was int8 indeed


@runs
def test_a_launch_a_layer_gives_the_same_bits_as_the_persistent_tower(
    model: Ranker, engine: Any
) -> None:
    inputs = request(model, (2, 21, 16))
    layers = engine_of(model, tower="layers")
    assert layers.describe()[-1]["launches"] == engine.describe()[-1]["launches"] + 3
    assert torch.equal(engine(*inputs), layers(*inputs))
    assert torch.equal(engine(*inputs), engine(*inputs))


@runs
def test_the_description_counts_launches_bytes_and_operations(engine: Any) -> None:
    *launches, total = engine.describe()
    assert [row["module"] for row in launches] == [
        "history",
        "encoder_block 0",
        "encoder_block 1",
        "candidates",
        "tower",
    ]
    assert total["launches"] == len(launches) <= 8
    for row in launches:
        assert row["bytes"] > 0
        assert row["flops"] > 0
        assert 0 < row["roofline_us"]["H200"] <= row["roofline_us"]["H100"]
    # The examples: 2 users, L = 21, m = 16; the tower's layers padded to multiples of 32.
    widths = [64, 64, 32, 64]
    tower = 2 * 32 * sum(a * b for a, b in itertools.pairwise(widths))
    assert launches[-1]["flops"] == tower + 2 * 32 * 64


@runs
def test_numpy_in_numpy_out_and_bad_input_leaves_the_engine_usable() -> None:
    model = ranker()
    engine = engine_of(model)
    inputs = request(model, (2, 5, 3))
    arrays = [t.numpy() for t in inputs]
    expected = engine(*inputs).numpy()
    assert isinstance(engine(*arrays), np.ndarray)
    with pytest.raises(IdRangeError, match="item"):
        engine(arrays[0] + 300, *arrays[1:])
    with pytest.raises(ArgumentError, match="6 inputs"):
        engine(*arrays[:3])
    assert np.array_equal(engine(*arrays), expected)
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine(*arrays)


@runs
def test_a_later_smaller_request_sees_nothing_of_an_earlier_one(model: Ranker, engine: Any) -> None:
    small = request(model, (2, 17, 9), seed=3)
    before = engine(*small)
    engine(*request(model, (2, 21, 16), seed=4))
    assert torch.equal(engine(*small), before)


@runs
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": EncoderConfig(pattern=fastrec.AttentionPattern(window=2))}, "window_sparse"),
        (
            {"encoder": EncoderConfig(projection="low_rank", rank=4)},
            "attention over padded keys.*out_proj",
        ),
        ({"tower": ()}, "hidden layer"),
    ],
    ids=str,
)
def test_a_model_of_another_kind_is_refused_by_name(changes: Any, message: str) -> None:
    model = ranker(**changes)
    with pytest.raises(BackendError, match=message):
        engine_of(model)


@runs
def test_precisions_that_do_not_fit_the_model() -> None:
    model = ranker()
    with pytest.raises(BackendError, match="quantize_"):
        engine_of(model, "int8")
    with pytest.raises(ArgumentError, match="settings"):
        engine_of(model, tower="none")


@pytest.mark.skipif(WHY_NOT is None, reason="the backend runs here")
def test_without_a_gpu_the_reason_is_given() -> None:
    with pytest.raises(BackendError, match=r"backend 'cuda' cannot run: .*(CUDA device|triton)"):
        engine_of(ranker())


@pytest.mark.skipif(WHY_NOT is not None or env.triton_interpret(), reason="needs a GPU")
class TestOnTheGpu:
    """Stand-ins for what the interpreter lacks: streams, graphs, tensors on the device."""

    def test_tensors_on_the_gpu_stay_there_and_follow_the_current_stream(
        self, model: Ranker, engine: Any
    ) -> None:
        inputs = request(model, (3, 17, 33))
        expected = engine(*inputs)
        there = [t.cuda() for t in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual = engine(*there)
        stream.synchronize()
        assert actual.is_cuda
        assert torch.equal(actual.cpu(), expected)

    def test_a_thousand_lengths_compile_nothing(self, model: Ranker, engine: Any) -> None:
        from fastrec.runtime.cuda.launches import KERNELS

        for length in range(1, 22):
            engine(*request(model, (2, length, 16)))

        def compiled() -> int:
            return sum(len(c[0]) for k in KERNELS for c in k.device_caches.values())

        before = compiled()
        rng = np.random.default_rng(0)
        for seed in range(1000):
            sizes = (int(rng.integers(1, 3)), int(rng.integers(1, 22)), int(rng.integers(9, 17)))
            engine(*request(model, sizes, seed=seed))
        assert compiled() == before

    def test_the_canonical_ranker(self) -> None:
        torch.manual_seed(0)
        model = Ranker(RankerConfig.taobao()).eval()
        inputs = request(model, (8, 100, 50))
        engine = fastrec.compile(model, inputs, "cuda", precision="bf16")
        expected = scores(model, inputs)
        noise = (engine(*inputs) - expected).abs().mean() / expected.std()
        assert float(noise) < 0.1
