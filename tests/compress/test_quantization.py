"""quantize_ with Int8: ranges, fusion, integer chains, equality with fake quantisation,
refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrec.compress import BlockPruning, Int8, prune_, quantize_
from fastrec.compress.observers import RangeObserver, affine_u8
from fastrec.errors import ArgumentError, DtypeError
from fastrec.nn import Int8Embedding, SparseInt8Linear


def tower(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(48, 96),
        nn.ReLU(),
        nn.Linear(96, 64),
        nn.GELU(),
        nn.Dropout(0.1),
        nn.Linear(64, 40),
        nn.ReLU(),
        nn.Linear(40, 1),
    ).eval()


def batches(n: int = 4, width: int = 48, seed: int = 1) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, width, generator=generator),) for _ in range(n)]


class Ranker(nn.Module):
    """A user's own model: tables, a residual layer, a head that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.items = nn.Embedding(1500, 24, padding_idx=0)
        self.kinds = nn.Embedding(5, 24)
        self.mix = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, item: Tensor, kind: Tensor) -> Tensor:
        x = self.items(item) + self.kinds(kind)
        x = self.norm(x + self.mix(x))
        return self.head(x).sum(-1) + self.head(-x).sum(-1)


def ids(n: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"item": rng.integers(0, 1500, (8, 6)), "kind": rng.integers(0, 5, (8, 6))}
        for _ in range(n)
    ]


@settings(max_examples=200, deadline=None)
@given(
    low=st.floats(-1e6, 1e6, width=32),
    width=st.floats(2**-10, 1e6, width=32),
    at=st.floats(0, 1, width=32),
)
def test_rounding_error_is_half_a_step_inside_the_range(
    low: float, width: float, at: float
) -> None:
    scale, zero_point = affine_u8(torch.tensor(low), torch.tensor(low + width))
    x = torch.tensor(low + at * width).clamp(low, low + width)
    code = ((x.double() / scale.double()).round() + zero_point).clamp(0, 255)
    back = (code - zero_point) * scale.double()
    # scale is a float32: 255 of its ulps may add up at the far end, hence the relative term
    assert abs(float(back - x.double())) <= float(scale) * (0.5 + 255 * 2**-23)
    assert 0 <= int(zero_point) <= 255


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (1e-30, 2e-30), (float("inf"), -float("inf"))]
)
def test_empty_and_constant_zero_ranges(low: float, high: float) -> None:
    assert affine_u8(torch.tensor(low), torch.tensor(high))[0].isfinite()
    scale, zero_point = affine_u8(torch.tensor(0.0), torch.tensor(0.0))
    assert (float(scale), int(zero_point)) == (1.0, 0)


def test_positive_ranges_have_zero_point_0_and_constants_are_kept() -> None:
    scale, zero_point = affine_u8(torch.tensor(3.0), torch.tensor(3.0))
    assert int(zero_point) == 0
    assert float(scale) == pytest.approx(3 / 255)
    assert int(affine_u8(torch.tensor(-2.0), torch.tensor(-1.0))[1]) == 255


def test_observer_methods_resist_an_outlier() -> None:
    observer = RangeObserver("layer")
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        observer.observe(torch.randn(50_000, generator=generator))
    observer.observe(torch.tensor([1000.0]))
    assert float(observer.range("minmax", 99.99)[1]) == 1000.0
    low, high = observer.range("percentile", 99.9)
    assert 2.9 < float(high) < 3.5
    assert -3.5 < float(low) < -2.9
    assert float(observer.range("mse", 99.99)[1]) < 1000.0


def test_observer_keeps_rare_values_of_a_sparse_feature() -> None:
    observer = RangeObserver("layer")
    values = torch.zeros(100_000)
    values[7] = 2.0
    observer.observe(values)
    assert float(observer.range("percentile", 99.9)[1]) == 2.0
    assert RangeObserver("never").range("mse", 99.9) == (torch.tensor(0.0), torch.tensor(0.0))


def test_tower_becomes_an_integer_chain_in_place() -> None:
    model = tower()
    report = quantize_(model, Int8(), calibration=batches())
    kinds = [type(m) for m in model]
    assert kinds == [
        SparseInt8Linear,
        nn.Identity,
        SparseInt8Linear,
        nn.Identity,
        nn.Identity,
        SparseInt8Linear,
        nn.Identity,
        nn.Linear,
    ]
    assert [layer.activation for layer in report.layers.values()] == ["relu", "gelu", "relu"]
    assert [layer.output for layer in report.layers.values()] == ["uint8", "uint8", "float32"]
    x = batches()[0][0]
    hidden = model[0](x)
    assert hidden.dtype == torch.uint8
    assert model[2](hidden).dtype == torch.uint8
    assert model[5](model[2](hidden)).dtype == torch.float32
    assert report.layers["2"].x_zero_point == 0  # behind a ReLU
    assert report.layers["5"].x_zero_point > 0  # GELU goes below zero
    assert report.layers["0"].density == 1.0


def fake_quantised(model: nn.Sequential, quantised: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The unfused float64 model with rounded weights and inputs; the outputs of all stages."""
    stages = []
    x = x.double()
    for layer, twin in zip(model, quantised, strict=True):
        if isinstance(twin, SparseInt8Linear):
            scale, zero = twin.x_scale.double(), twin.x_zero_point
            x = (((x / scale).round() + zero).clamp(0, 255) - zero) * scale
            weight = twin.dequantized_weight().double()
            x = x @ weight.T + layer.bias.double()
        else:
            x = layer.double()(x)
        stages.append(x)
    return stages


def test_fused_chain_equals_the_unfused_fake_quantised_model() -> None:
    model, quantised = tower(), tower()
    quantize_(quantised, Int8(), calibration=batches())
    x = batches(1, seed=9)[0][0]
    stages = fake_quantised(model, quantised, x)
    # First layer alone: the accumulator is exact, the epilogue has three float32 roundings (scale,
    # product, bias) and the requantisation one: a code differs by one where a value lies within
    # those of a boundary, never by more.
    consumer = quantised[2]
    scale, zero = consumer.x_scale.double(), consumer.x_zero_point
    expected = ((stages[1] / scale).round() + zero).clamp(0, 255)
    codes = quantised[0](x)
    difference = (codes.double() - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.005
    # Through the chain: a code that is off by one moves output n of its reader by s |w_nk|.
    assert torch.equal(quantised[1](codes), codes)
    result = quantised[2](codes)
    moved = (difference * scale) @ quantised[2].dequantized_weight().double().abs().T
    next_scale = quantised[5].x_scale.double()
    bound = moved * 1.13 / next_scale + 1  # GELU's slope is at most 1.13
    wanted = ((stages[3] / next_scale).round() + quantised[5].x_zero_point).clamp(0, 255)
    assert bool(((result.double() - wanted).abs() <= bound).all())
    assert ((result.double() - wanted).abs() > 0).float().mean() < 0.05


def test_quantised_output_is_close_and_pruned_groups_are_dropped() -> None:
    model = tower()
    prune_(model, BlockPruning(0.4, scale="output"), lambda m, n: n in ("0", "2"))
    x = batches(1, seed=5)[0][0]
    before = model(x)
    report = quantize_(model, Int8(), calibration=batches())
    assert report.layers["0"].density < 0.75
    after = model(x)
    assert (after - before).square().mean() < 0.01 * before.var()


def test_users_own_model_with_tables_and_a_layer_called_twice() -> None:
    model = Ranker().eval()
    data = [torch.as_tensor(v) for v in ids(1)[0].values()]
    before = model(*data)
    report = quantize_(model, Int8("minmax"), calibration=ids())
    assert isinstance(model.items, Int8Embedding)
    assert isinstance(model.kinds, nn.Embedding)
    assert report.tables == ["items"]
    assert set(report.layers) == {"mix", "head.0", "head.2"}
    assert report.layers["head.0"].output == "uint8"
    assert report.layers["mix"].activation is None
    after = model(*data)
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.999
    assert not model.training


class Steps(nn.Module):
    """Reads the layers of a Sequential one by one: nothing inside of it may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum()
        for layer in self.layers:
            x = layer(x)
            total = total + x.sum()
        return total


def test_a_sequential_that_is_taken_apart_is_not_fused() -> None:
    model = Steps().eval()
    x = batches(1)[0][0]
    before = model(x)
    report = quantize_(model, Int8(), calibration=batches())
    assert {layer.activation for layer in report.layers.values()} == {None}
    assert isinstance(model.layers[1], nn.ReLU)
    torch.testing.assert_close(model(x), before, rtol=0.05, atol=5.0)


def test_shared_modules_are_swapped_everywhere_and_not_fused() -> None:
    torch.manual_seed(0)
    layer, relu = nn.Linear(48, 48), nn.ReLU()
    model = nn.Sequential(layer, relu, layer, relu).eval()
    x = batches(1)[0][0]
    before = model(x)
    quantize_(model, Int8(), calibration=batches())
    assert model[0] is model[2]
    assert isinstance(model[0], SparseInt8Linear)
    assert isinstance(model[1], nn.ReLU)
    assert (model(x) - before).abs().mean() < 0.05 * before.abs().mean()


def test_tanh_gelu_is_not_the_kernels_gelu() -> None:
    model = nn.Sequential(nn.Linear(48, 32), nn.GELU(approximate="tanh")).eval()
    report = quantize_(model, Int8(), calibration=batches())
    assert report.layers["0"].activation is None
    assert isinstance(model[1], nn.GELU)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True, add_zero_attn=True)
        self.encoder = nn.TransformerEncoderLayer(48, 4, 64, batch_first=True)
        self.encoder.self_attn.add_zero_attn = True
        self.unused = nn.Linear(48, 48)
        self.out = nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.attention(x, x, x)[0]))


def test_layers_whose_weight_is_read_directly_are_left_in_float() -> None:
    model = Attention().eval()
    x = torch.randn(2, 5, 48)
    report = quantize_(model, Int8(), calibration=[x])
    assert set(report.layers) == {"out"}
    assert report.left["unused"] == "never called as a module during calibration"
    inside = {"self_attn", "self_attn.out_proj", "linear1", "linear2"}
    others = {"attention", "attention.out_proj", *(f"encoder.{name}" for name in inside)}
    assert set(report.left) == {"unused", *others}
    assert model(x).isfinite().all()


def test_training_flags_come_back_and_dropout_is_off_while_calibrating() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(48, 32)).train()
    report = quantize_(model, Int8("minmax"), calibration=[torch.ones(4, 48)])
    assert report.layers["1"].x_scale == pytest.approx(1 / 255)
    assert model.training
    assert model[1].training
    assert model[0].training


def test_batches_may_be_tensors_tuples_mappings_or_objects() -> None:
    class Batch:
        def inputs(self) -> tuple[np.ndarray]:
            return (np.ones((2, 48), dtype=np.float32),)

    x = torch.ones(2, 48)
    for batch in (x, (x,), [x], {"input": x}, Batch()):
        model = nn.Sequential(nn.Linear(48, 32)).eval()
        assert quantize_(model, Int8(), calibration=iter([batch])).layers["0"].x_scale > 0


def untouched(model: nn.Module) -> bool:
    return all(not isinstance(m, SparseInt8Linear) for m in model.modules()) and not any(
        m._forward_pre_hooks for m in model.modules()
    )


def test_bad_calibration_leaves_the_model_untouched() -> None:
    model = tower()
    with pytest.raises(ArgumentError, match="calibration: expected an iterable"):
        quantize_(model, Int8())
    with pytest.raises(ArgumentError, match="at least one batch"):
        quantize_(model, Int8(), calibration=[])
    for bad in (float("nan"), float("inf")):
        broken = [*batches(), (torch.full((2, 48), bad),)]
        with pytest.raises(ArgumentError, match="NaN or infinity at the input of '0'"):
            quantize_(model, Int8(), calibration=broken)
    with pytest.raises(RuntimeError, match="shapes"):
        quantize_(model, Int8(), calibration=[torch.ones(2, 47)])
    assert untouched(model)


def test_bad_models_and_configurations() -> None:
    with pytest.raises(ArgumentError, match="none"):
        quantize_(nn.Sequential(nn.ReLU()), Int8(), calibration=[torch.ones(1)])
    with pytest.raises(ArgumentError, match=r"wrap it in nn\.Sequential"):
        quantize_(nn.Linear(48, 48), Int8(), calibration=[torch.ones(1, 48)])
    with pytest.raises(DtypeError, match="config"):
        quantize_(tower(), "int8", calibration=batches())
    with pytest.raises(ArgumentError, match="calibration_method"):
        Int8("entropy")
    with pytest.raises(ArgumentError, match="percentile"):
        Int8(percentile=40)
    broken = tower()
    broken[2].bias.data[0] = float("nan")
    with pytest.raises(ArgumentError, match=r"2\.bias"):
        quantize_(broken, Int8(), calibration=batches())
    assert untouched(broken)


def test_nan_scales_are_refused() -> None:
    model = tower()
    quantize_(model, Int8(), calibration=batches())
    with pytest.raises(ArgumentError, match="scale"):
        model[0].set_output_quantization(float("nan"), 0)
    state = model.state_dict()
    state["0.x_scale"] = torch.tensor(float("nan"))
    with pytest.raises((ArgumentError, RuntimeError), match="x_scale"):
        model.load_state_dict(state)
