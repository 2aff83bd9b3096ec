"""``fastrec.nn``: drop-in behaviour, state, copies, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastrec.errors import ArgumentError, DtypeError, IdRangeError, ShapeError
from fastrec.nn import Int8Embedding, SparseInt8Linear


def linear(inputs: int = 24, outputs: int = 40, *, pruned: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    if pruned:
        with torch.no_grad():
            layer.weight[:, 4:12] = 0
    return layer


def quantised(*, pruned: bool = False, activation: str | None = None) -> SparseInt8Linear:
    return SparseInt8Linear.from_float(
        linear(pruned=pruned), calibration=[torch.randn(64, 24)], activation=activation
    )


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_close_to_the_float_layer(activation: str | None) -> None:
    layer = linear()
    x = torch.randn(64, 24)
    module = SparseInt8Linear.from_float(layer, calibration=[x], activation=activation)
    expected = layer(x)
    if activation:
        expected = getattr(nn.functional, activation)(expected)
    # Each input is off by at most half a step, each weight likewise; both sums bound |error|.
    # GELU's slope is at most 1.13.
    step = module.x_scale.item() / 2
    weight = layer.weight.abs().sum(1) * step
    rounding = (module.w_scale / 2) * (x.abs().sum(1, keepdim=True) + 24 * step)
    assert bool(((module(x) - expected).abs() <= 1.13 * (weight + rounding) + 1e-5).all())


def test_pruned_groups_are_dropped_and_stay_zero() -> None:
    module = quantised(pruned=True)
    assert module.density == pytest.approx(4 / 6)
    assert not module.dequantized_weight()[:, 4:12].any()


def test_state_dict_round_trips_whatever_was_pruned() -> None:
    source = quantised(pruned=True)
    source.set_output_quantization(0.05, 3)
    target = SparseInt8Linear(24, 40)
    target.load_state_dict(source.state_dict())
    x = torch.randn(7, 24)
    assert target(x).dtype == torch.uint8
    assert torch.equal(target(x), source(x))
    plain = quantised()
    target.load_state_dict(plain.state_dict())
    assert torch.equal(target(x), plain(x))


def test_a_broken_state_dict_is_refused() -> None:
    state = quantised().state_dict()
    state["group_index"] = state["group_index"] + 100
    with pytest.raises(RuntimeError, match="group_index: expected values in"):
        SparseInt8Linear(24, 40).load_state_dict(state)
    state = quantised().state_dict()
    state["x_scale"] = torch.tensor(float("nan"))
    with pytest.raises(RuntimeError, match="x_scale: expected a finite number"):
        SparseInt8Linear(24, 40).load_state_dict(state)


def test_copies_are_independent() -> None:
    module = quantised()
    x = torch.randn(3, 24)
    before = module(x)
    duplicate = copy.deepcopy(module)
    duplicate.set_input_quantization(1.0, 0)
    assert torch.equal(module(x), before)
    assert not torch.equal(duplicate(x), before)


def test_changing_the_dtype_leaves_the_scales_alone() -> None:
    module = quantised()
    x = torch.randn(3, 24)
    before = module(x)
    assert torch.equal(module.to(torch.bfloat16)(x), before)
    table = Int8Embedding.from_float(nn.Embedding(10, 6))
    ids = torch.tensor([1, 9])
    rows = table(ids)
    assert torch.equal(table.half()(ids), rows)


def test_compiles_without_graph_breaks_and_exports() -> None:
    model = nn.Sequential(quantised(activation="relu"), nn.LayerNorm(40)).eval()
    x = torch.randn(5, 24)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        exported = torch.export.export(model, (x,)).module()
        assert torch.equal(exported(x), expected)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(2, 23), ShapeError),
        (torch.zeros(2, 24, dtype=torch.float64), DtypeError),
        (torch.full((2, 24), torch.nan), ArgumentError),
    ],
)
def test_bad_input_leaves_the_module_usable(x: torch.Tensor, error: type[Exception]) -> None:
    module = quantised()
    with pytest.raises(error, match="x: expected"):
        module(x)
    assert module(torch.zeros(2, 24)).isfinite().all()


def test_from_float_needs_one_source_of_the_input_range() -> None:
    with pytest.raises(ArgumentError, match="either calibration or x_scale"):
        SparseInt8Linear.from_float(linear())
    with pytest.raises(ArgumentError, match="either calibration or x_scale"):
        SparseInt8Linear.from_float(linear(), calibration=[torch.zeros(1, 24)], x_scale=1.0)
    with pytest.raises(ArgumentError, match="at least one value"):
        SparseInt8Linear.from_float(linear(), calibration=[])
    with pytest.raises(ArgumentError, match="finite values"):
        SparseInt8Linear.from_float(linear(), calibration=[torch.full((1, 24), torch.inf)])


def test_constant_calibration_is_usable() -> None:
    module = SparseInt8Linear.from_float(linear(), calibration=[torch.zeros(4, 24)])
    assert torch.equal(module(torch.zeros(2, 24)), linear().bias.detach().expand(2, -1))


def test_embedding_error_is_half_a_step() -> None:
    table = nn.Embedding(50, 7)
    module = Int8Embedding.from_float(table)
    ids = torch.arange(50).reshape(5, 10)
    error = (module(ids) - table(ids)).abs()
    # Half a step, and one rounding of the product.
    assert bool((error <= module.scale[ids, None] * 0.5001).all())


def test_embedding_refuses_ids_outside() -> None:
    module = Int8Embedding.from_float(nn.Embedding(5, 3))
    with pytest.raises(IdRangeError, match=r"ids in \[0, 5\), got 5"):
        module(torch.tensor([5]))
    assert module(torch.tensor([4])).shape == (1, 3)


def test_zero_rows_stay_exactly_zero() -> None:
    table = nn.Embedding(4, 3, padding_idx=0)
    assert not Int8Embedding.from_float(table)(torch.tensor([0])).any()


def test_an_int8_table_takes_int32_ids_as_torchs_does() -> None:
    torch.manual_seed(0)
    table = Int8Embedding.from_float(nn.Embedding(40, 8))
    ids = torch.randint(0, 40, (3, 5))
    assert torch.equal(table(ids.int()), table(ids))
    with pytest.raises(IdRangeError):
        table(torch.tensor([40], dtype=torch.int32))
