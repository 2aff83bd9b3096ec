"""``fastrec.nn.LayerNorm``: torch's, with the engine's bits where no gradient is wanted."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastrec
from fastrec.kernels import layer_norm_quantize
from fastrec.kernels._compiled import reason_missing
from fastrec.nn import LayerNorm

compiled = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))


def norms(affine: bool = True, bias: bool = True) -> tuple[nn.LayerNorm, LayerNorm]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(70, eps=1e-3, elementwise_affine=affine, bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm, LayerNorm.from_float(norm)


@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, False)])
def test_it_is_torchs_norm(affine: bool, bias: bool) -> None:
    norm, ours = norms(affine, bias)
    assert list(ours.parameters()) == list(norm.parameters())
    assert repr(ours) == repr(norm)
    for shape in ((5, 70), (70,), (0, 70), (2, 3, 70)):
        x = torch.randn(shape)
        with torch.no_grad():
            # Means and variances of 70 numbers in other orders: some units in the last place.
            torch.testing.assert_close(ours(x), norm(x), rtol=1e-5, atol=1e-5)
    x = torch.randn(4, 70, dtype=torch.float64)
    assert torch.equal(ours.double()(x), norm.double()(x))


@compiled
def test_inference_has_the_kernels_bits_and_training_torchs() -> None:
    norm, ours = norms()
    x = torch.randn(33, 70)
    assert torch.equal(ours(x), norm(x))  # the parameters want gradients
    ours(x).sum().backward()
    assert norm.weight.grad is not None
    with torch.inference_mode():
        assert torch.equal(ours(x), layer_norm_quantize(x, norm.weight, norm.bias, eps=1e-3))
        half = copy.deepcopy(ours).bfloat16()
        assert half(x.bfloat16()).dtype is torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours(x), norm(x))


def test_errors_and_several_dimensions_are_torchs() -> None:
    ours = norms()[1]
    with torch.no_grad(), pytest.raises(RuntimeError, match="normalized_shape"):
        ours(torch.randn(3, 71))
    wide = nn.LayerNorm((3, 70))
    x = torch.randn(2, 3, 70)
    with torch.no_grad():
        assert torch.equal(LayerNorm.from_float(wide)(x), wide(x))


def test_tracing_sees_torchs_operator() -> None:
    ours = norms()[1].eval()
    with torch.no_grad():
        program = torch.export.export(ours, (torch.randn(3, 70),))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.layer_norm.default"]


class Block(nn.Module):
    """A norm before a layer, and one that it shares."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.again = self.norm
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.layer(self.norm(x)))


def test_quantized_and_loaded_models_have_it(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 32)
    fastrec.quantize_(model, fastrec.Int8(), calibration=[x])
    assert type(model.norm) is LayerNorm
    assert model.again is model.norm
    loaded = fastrec.load(fastrec.save(model, tmp_path / "block"), model=Block())
    assert type(loaded.norm) is LayerNorm
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    plain = fastrec.load(fastrec.save(Block(), tmp_path / "plain"), model=Block())
    assert type(plain.norm) is nn.LayerNorm
