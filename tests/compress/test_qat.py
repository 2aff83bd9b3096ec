"""QAT: straight-through gradients, learned ranges, zeros that stay, conversion to the same
numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrec.compress import QAT, BlockPruning, Int8, prune_, quantize_
from fastrec.compress.fake_quant import FakeQuantEmbedding, FakeQuantLinear, row_scales
from fastrec.errors import ArgumentError
from fastrec.nn import Int8Embedding, SparseInt8Linear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(1200, 64, padding_idx=0)
        self.net = nn.Sequential(
            nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 1)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(self.table(ids)).squeeze(-1)


def ids(n: int = 200, seed: int = 0) -> Tensor:
    return torch.randint(0, 1200, (n,), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 20) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    losses = []
    for step in range(steps):
        x = ids(seed=step)
        loss = (model(x) - (x % 7 - 3).float()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_weights_round_as_the_paper_says_and_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    twin = FakeQuantLinear.twin_of(linear, averaging=0.01)
    rounded, scale = twin.quantized_weight()
    low, high = -linear.weight.abs().amax(1), linear.weight.abs().amax(1)
    torch.testing.assert_close(scale, (high - low) / (2**8 - 2))
    expected = ((linear.weight / scale[:, None]).round() * scale[:, None]).clamp(
        low[:, None], high[:, None]
    )
    torch.testing.assert_close(rounded, expected)
    assert bool(((rounded - linear.weight).abs() <= scale[:, None] * 0.50001).all())
    rounded.sum().backward()
    assert torch.equal(linear.weight.grad, torch.ones(16, 16))


def test_input_gradient_stops_outside_the_range() -> None:
    twin = FakeQuantLinear.twin_of(nn.Linear(16, 16), averaging=0.01).eval()
    twin.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    x = torch.linspace(-3, 3, 16, requires_grad=True)
    twin(x).sum().backward()
    inside = x.detach().abs() <= 1.0
    assert bool((x.grad[~inside] == 0).all())
    assert bool((x.grad[inside] != 0).all())


def test_ranges_follow_training_and_freeze_in_eval() -> None:
    twin = FakeQuantLinear.twin_of(nn.Linear(4, 4), averaging=0.5).train()
    twin(torch.tensor([[-1.0, 0.0, 1.0, 3.0]]))
    assert (float(twin.x_min), float(twin.x_max)) == (-1.0, 3.0)
    twin(torch.tensor([[-3.0, 0.0, 1.0, 5.0]]))
    assert (float(twin.x_min), float(twin.x_max)) == (-2.0, 4.0)
    twin.eval()(torch.full((1, 4), 100.0))
    assert float(twin.x_max) == 4.0


def test_prepare_keeps_parameters_and_keys() -> None:
    model = Net()
    before = dict(model.named_parameters())
    report = quantize_(model, QAT("prepare"))
    assert report.prepared == ["net.0", "net.2", "table"]
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(model.get_parameter(name) is value for name, value in before.items())
    assert isinstance(model.table, FakeQuantEmbedding)
    assert isinstance(model.net[4], nn.Linear)


def test_training_learns_and_pruned_weights_stay_zero() -> None:
    model = Net()
    prune_(model, BlockPruning(0.4, rounds=1, scale="output"), lambda m, n: n != "net.4")
    zeros = {n: p.detach() == 0 for n, p in model.named_parameters() if p.ndim == 2}
    quantize_(model, QAT("prepare"))
    losses = train(model, 40)
    assert losses[-1] < losses[0]
    quantize_(model, QAT("convert"))
    for name in ("net.0", "net.2"):
        layer = model.get_submodule(name)
        assert bool((layer.dequantized_weight()[zeros[f"{name}.weight"]] == 0).all())
        assert layer.density < 0.8
    assert bool((model.table.weight[zeros["table.weight"]] == 0).all())


def test_converted_model_computes_what_the_fake_quantised_one_does() -> None:
    model = Net()
    quantize_(model, QAT("prepare"))
    train(model)
    model.eval()
    x = ids(2000, seed=99)
    reference = copy.deepcopy(model)
    quantize_(model, QAT("convert"))
    assert [type(m) for m in model.net] == [
        SparseInt8Linear,
        nn.Identity,
        SparseInt8Linear,
        nn.Identity,
        nn.Linear,
    ]
    assert isinstance(model.table, Int8Embedding)
    # The same integers in weights and ranges ...
    for index in (0, 2):
        twin, layer = reference.net[index], model.net[index]
        weight, scale = twin.quantized_weight()
        assert torch.equal(layer.w_scale, scale)
        torch.testing.assert_close(layer.dequantized_weight(), weight, rtol=2e-7, atol=0)
        assert float(layer.x_scale) == float(twin.input_qparams()[0])
    # ... so the first layer's inputs are the same rows but for their last bit, and a value differs
    # only where that bit moves a code across a boundary (seldom), and then by one step.
    rows = model.table(x)
    torch.testing.assert_close(rows, reference.table(x), rtol=3e-7, atol=1e-7)
    codes = model.net[0](rows).float()
    wanted = reference.net[1](reference.net[0](rows))
    step = model.net[2].x_scale
    moved = (codes - (wanted / step).round().clamp(max=255)).abs()
    assert moved.max() <= 1
    assert (moved > 0).float().mean() < 0.002
    # End to end: at most a few such steps, each no more than s_x |w| at the next layer.
    with torch.no_grad():
        out, expected = model(x), reference(x)
    worst = step * reference.net[2].weight.abs().amax() * 1.13 * reference.net[4].weight.abs().sum()
    assert (out - expected).abs().max() <= 3 * worst
    assert (out - expected).abs().median() <= 1e-5 * expected.abs().max()


def test_calibration_sets_the_initial_ranges() -> None:
    model = Net()
    quantize_(model, QAT("prepare"), calibration=[(ids(),)])
    static = Net()
    report = quantize_(static, Int8(), calibration=[(ids(),)])
    assert float(model.net[0].input_qparams()[0]) == report.layers["net.0"].x_scale
    quantize_(model, QAT("convert"))  # without a training step it equals static INT8
    assert isinstance(model.net[0], SparseInt8Linear)
    # no forward since prepare showed that the Sequential runs as a whole: nothing is fused
    assert isinstance(model.net[1], nn.ReLU)
    assert (model(ids()) - static(ids())).abs().max() < 0.02


def test_convert_leaves_no_trace() -> None:
    model = Net()
    quantize_(model, QAT("prepare"))
    train(model, 2)
    quantize_(model, QAT("convert"))
    assert not model.net._forward_pre_hooks
    assert not any("fastrec" in key for m in model.modules() for key in m.__dict__)


def test_a_never_trained_zero_layer_may_still_learn() -> None:
    linear = nn.Linear(32, 32)
    nn.init.zeros_(linear.weight)
    twin = FakeQuantLinear.twin_of(linear, 0.01)
    assert twin.dropped is None
    assert torch.equal(row_scales(linear.weight), torch.ones(32))


def test_bad_calls_leave_the_model_untouched() -> None:
    with pytest.raises(ArgumentError, match="step"):
        QAT("finish")
    with pytest.raises(ArgumentError, match="averaging"):
        QAT(averaging=-1)
    with pytest.raises(ArgumentError, match="has prepared"):
        quantize_(Net(), QAT("convert"))
    model = Net()
    quantize_(model, QAT("prepare"))
    with pytest.raises(ArgumentError, match=r"no batch at the input of 'net\.0'"):
        quantize_(model, QAT("convert"))
    model.net[0].x_max.fill_(float("nan"))
    model.net[0].x_min.fill_(0.0)
    with pytest.raises(ArgumentError, match="NaN"):
        quantize_(model, QAT("convert"))
    assert isinstance(model.net[0], FakeQuantLinear)


def test_fewer_levels_bound_the_codes_and_survive_conversion() -> None:
    net = Net()
    prune_(net, BlockPruning(sparsity=0.4, rounds=1, embedding_block=(1, 1)))
    static = copy.deepcopy(net)
    quantize_(net, QAT("prepare", levels=15))
    train(net)
    expected = net.eval()(ids())
    quantize_(net, QAT("convert"))
    torch.testing.assert_close(net(ids()), expected, rtol=0.02, atol=0.02)
    quantize_(static, Int8(levels=15), calibration=[ids()])
    for model in (net, static):
        assert model.table.weight.abs().max() == model.net[0].values.abs().max() == 15
        assert (model.table.weight == 0).float().mean() >= 0.4
    for bad in (0, 128, 3.5, True):
        with pytest.raises(ArgumentError, match="levels"):
            QAT("prepare", levels=bad)
    with pytest.raises(ArgumentError, match="levels"):
        Int8Embedding.from_float(nn.Embedding(3, 4), levels=128)


def twins(pruned: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(1200, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    if pruned:
        prune_(model, BlockPruning(sparsity=0.5, block=(8, 4), rounds=1))
    quantize_(model, QAT("prepare"), [torch.arange(100)])
    return model


def train_with_decay(model: nn.Module, steps: int = 3) -> None:
    """With momentum and weight decay, which move weights that have no gradient."""
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for step in range(steps):
        optimiser.zero_grad()
        model(torch.arange(step, step + 50)).square().mean().backward()
        optimiser.step()


def zeros(model: nn.Module) -> list[float]:
    state = model.state_dict()  # as a checkpoint would hold it
    return [float((v == 0).float().mean()) for k, v in state.items() if k.endswith("weight")]


def test_a_resumed_run_keeps_the_pruned_zeros() -> None:
    model = twins(pruned=True)
    before = zeros(model)
    assert min(before) > 0.3
    train_with_decay(model)
    assert zeros(model) == before
    resumed = twins(pruned=False)
    resumed.load_state_dict(model.state_dict())
    train_with_decay(resumed)
    assert zeros(resumed) == before
    quantize_(resumed, QAT("convert"))
    dropped = (resumed[1].packed.unpack() == 0).float().mean()
    assert float(dropped) >= before[1]


def test_a_dense_checkpoint_in_a_pruned_twin_stays_dense() -> None:
    dense = twins(pruned=False)
    model = twins(pruned=True)
    model.load_state_dict(dense.state_dict())
    ids = torch.arange(50)
    assert torch.equal(model.eval()(ids), dense.eval()(ids))
    train_with_decay(model)
    assert max(zeros(model)) == 0.0


@settings(max_examples=12, deadline=None)
@given(
    sparsity=st.floats(0.1, 0.6),
    optimiser=st.sampled_from(["sgd", "adamw"]),
    stop=st.integers(0, 2),
    fresh_is_pruned=st.booleans(),
)
def test_a_run_resumed_anywhere_is_the_run_that_was_not_interrupted(
    sparsity: float, optimiser: str, stop: int, fresh_is_pruned: bool
) -> None:
    def start(pruned: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(1200, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        if pruned:
            prune_(model, BlockPruning(sparsity, block=(8, 4), rounds=1))
        quantize_(model, QAT("prepare"), [torch.arange(100)])
        if optimiser == "sgd":
            return model, torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.01)
        return model, torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)

    def steps(model: nn.Module, update: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            update.zero_grad()
            model(torch.arange(step, step + 50)).square().mean().backward()
            update.step()

    whole, update = start(pruned=True)
    before = zeros(whole)
    steps(whole, update, 0, stop)
    state = copy.deepcopy((whole.state_dict(), update.state_dict()))
    steps(whole, update, stop, 3)
    resumed, update = start(fresh_is_pruned)
    resumed.load_state_dict(state[0])
    update.load_state_dict(state[1])
    steps(resumed, update, stop, 3)
    assert zeros(resumed) == zeros(whole) == before
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
