"""``WindowSparseAttention`` against ``nn.MultiheadAttention`` with the pattern as its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_checks import close, keeps_the_promises
from torch import Tensor, nn

import fastrec
from fastrec import AttentionPattern
from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.nn import SparseInt8Linear, WindowSparseAttention

WIDE = AttentionPattern(window=100, offsets="none")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"projection": "grouped", "groups": 4},
    {"projection": "separable", "kernel_size": 3},
    {"projection": "low_rank", "rank": 8},
    {"qk_rank": 3},
]


class Output(nn.Module):
    """The attention's output alone, for checks that take a tensor in and a tensor out."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


def torchs(d: int = 32, heads: int = 4, **options: Any) -> nn.MultiheadAttention:
    mha = nn.MultiheadAttention(d, heads, batch_first=True, **options)
    if mha.in_proj_bias is not None:
        nn.init.normal_(mha.in_proj_bias)
        nn.init.normal_(mha.out_proj.bias)
    return mha


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    dims=st.integers(1, 17),
    length=st.integers(1, 40),
    window=st.integers(0, 45),
    offsets=st.sampled_from(["none", "log2", "strided:5"]),
    causal=st.booleans(),
    bias=st.booleans(),
    lengths=st.booleans(),
)
def test_values_and_gradients_are_those_of_torch_with_a_mask(
    batch: int,
    heads: int,
    dims: int,
    length: int,
    window: int,
    offsets: str,
    causal: bool,
    bias: bool,
    lengths: bool,
) -> None:
    pattern = AttentionPattern(window, offsets, causal)
    d = heads * dims
    mha = torchs(d, heads, bias=bias)
    module = WindowSparseAttention.from_mha(mha, pattern)
    x = torch.randn(batch, length, d)
    valid = torch.randint(1, length + 1, (batch,)) if lengths else torch.full((batch,), length)
    padded = torch.arange(length) >= valid[:, None]
    blocked = ~pattern.mask(length)[0]
    # Torch's rows with nothing to see are NaN; ours are compared elsewhere.
    sees = (~blocked[None] & ~padded[:, None, :]).any(-1)
    results = []
    for attend in (
        lambda x: module(x, x, x, key_padding_mask=padded)[0],
        lambda x: module(x, lengths=valid)[0],
        lambda x: module(x, x, x, padded, need_weights=True)[0],
        lambda x: mha(x, x, x, key_padding_mask=padded, attn_mask=blocked)[0],
    ):
        row = x.clone().requires_grad_()
        y = torch.where(sees[..., None], attend(row), 0.0)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        # Through the NaN rows torch's own gradients are NaN: compared where there are none.
        grads = torch.autograd.grad((y * weights).sum(), [row]) if bool(sees.all()) else ()
        results.append((y, *grads))
    for result in results[:-1]:
        for got, expected in zip(result, results[-1], strict=True):
            close(got, expected, 4 * (d + length))


def test_a_window_that_covers_everything_is_dense_attention() -> None:
    mha = torchs()
    x = torch.randn(2, 9, 32)
    for options in ({}, {"projection": "separable"}, {"projection": "grouped"}, {"qk_rank": 8}):
        module = WindowSparseAttention.from_mha(mha, WIDE, **options)
        close(module(x, x, x)[0], mha(x, x, x)[0], 32 * 9)


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_projections_and_scores_are_exact(bias: bool) -> None:
    mha = torchs(bias=bias)
    with torch.no_grad():
        # scores of rank 3 in each head: q's and k's rows beyond the third are zero
        mha.in_proj_weight[:64].view(8, 8, 32)[:, 3:] = 0
        if bias:
            mha.in_proj_bias[:64].view(8, 8)[:, 3:] = 0
    x = torch.randn(2, 9, 32)
    narrow = WindowSparseAttention.from_mha(mha, WIDE, qk_rank=3)
    assert narrow.in_proj.out_features == 2 * 4 * 3 + 32
    close(narrow(x)[0], mha(x, x, x)[0], 32 * 9)
    close(narrow(x, need_weights=True)[0], mha(x, x, x)[0], 32 * 9)
    low = WindowSparseAttention.from_mha(mha, WIDE, projection="low_rank", rank=32)
    close(low(x)[0], mha(x, x, x)[0], 32 * 9)


@pytest.mark.parametrize("options", OPTIONS)
def test_keeps_the_promises(options: dict[str, Any]) -> None:
    module = WindowSparseAttention(32, 4, pattern=AttentionPattern(2), **options)
    keeps_the_promises(Output(module).eval(), torch.randn(3, 9, 32))


@pytest.mark.parametrize("options", OPTIONS)
def test_padding_is_not_read_and_every_path_agrees(options: dict[str, Any]) -> None:
    pattern = AttentionPattern(2, causal=True)
    module = WindowSparseAttention(32, 4, pattern=pattern, **options)
    x = torch.randn(2, 9, 32)
    alone = module(x[1:, :5])[0]
    x[1, 5:] = torch.nan
    lengths = torch.tensor([9, 5])
    padded = torch.arange(9) >= lengths[:, None]
    for arguments in (
        {"lengths": lengths},
        {"key_padding_mask": padded},
        {"key_padding_mask": torch.zeros(2, 9).masked_fill(padded, -torch.inf)},
        {"lengths": lengths, "need_weights": True},
        {"lengths": lengths, "attn_mask": torch.zeros(9, 9)},
    ):
        close(module(x, x, x, **arguments)[0][1:, :5], alone, 32 * 9)


def test_weights_are_those_of_torch() -> None:
    mha = torchs()
    module = WindowSparseAttention.from_mha(mha, WIDE)
    x = torch.randn(2, 9, 32)
    for average in (True, False):
        expected = mha(x, x, x, average_attn_weights=average)
        got = module(x, x, x, need_weights=True, average_attn_weights=average)
        close(got[0], expected[0], 32 * 9)
        close(got[1], expected[1], 32 * 9)
    assert module(x, x, x)[1] is None


def test_masks_that_are_no_padding_are_honoured() -> None:
    mha = torchs()
    module = WindowSparseAttention.from_mha(mha, WIDE)
    x = torch.randn(2, 9, 32)
    scattered = torch.rand(2, 9) < 0.5
    scattered[:, 4] = False
    blocked = torch.rand(9, 9) < 0.5
    blocked[:, 4] = False
    for masks in (
        {"key_padding_mask": scattered},
        {"attn_mask": blocked},
        {"attn_mask": torch.randn(8, 9, 9)},
        {"attn_mask": blocked, "key_padding_mask": scattered},
    ):
        close(module(x, x, x, **masks)[0], mha(x, x, x, **masks)[0], 32 * 9)


def test_rows_that_see_nothing_get_the_bias_alone() -> None:
    module = WindowSparseAttention(8, 2)
    nn.init.normal_(module.out_proj.bias)
    x = torch.randn(2, 3, 8)
    for need_weights in (False, True):
        y = module(x, lengths=torch.tensor([3, 0]), need_weights=need_weights)[0]
        assert torch.equal(y[1], module.out_proj.bias.expand(3, 8))


@pytest.mark.parametrize("options", OPTIONS)
def test_layouts_and_three_inputs(options: dict[str, Any]) -> None:
    module = WindowSparseAttention(32, 4, pattern=AttentionPattern(2), **options)
    x = torch.randn(2, 9, 32)
    expected = module(x)[0]
    close(module(x[0])[0], expected[0], 32 * 9)
    close(module(x, x.clone(), x.clone())[0], expected, 32 * 9)
    module.batch_first = False
    close(module(x.transpose(0, 1))[0], expected.transpose(0, 1), 32 * 9)


def test_dropout_while_training_is_of_the_weights() -> None:
    module = WindowSparseAttention(32, 4, dropout=0.5, pattern=WIDE)
    x = torch.randn(2, 9, 32)
    _, weights = module(x, need_weights=True, average_attn_weights=False)
    assert 0.3 < float((weights == 0).float().mean()) < 0.7
    assert not (module.eval()(x, need_weights=True)[1] == 0).any()


def test_takes_its_place_in_torchs_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 9, 32)
    padded = torch.arange(9) >= torch.tensor([[9], [5]])
    expected = layer(x, src_key_padding_mask=padded)
    layer.self_attn = WindowSparseAttention.from_mha(layer.self_attn, WIDE)
    got = layer(x, src_key_padding_mask=padded)
    close(got[~padded], expected[~padded], 32 * 9)
    layer.train()
    close(layer(x, src_key_padding_mask=padded)[~padded], expected[~padded], 32 * 9)


def test_compression_treats_its_layers_as_usual() -> None:
    model = Output(WindowSparseAttention(64, 4))
    fastrec.prune_(model, fastrec.BlockPruning(sparsity=0.4, block=(32, 4)))
    fastrec.quantize_(model, fastrec.Int8(), calibration=[torch.randn(2, 9, 64)])
    assert isinstance(model.attention.in_proj, SparseInt8Linear)
    assert isinstance(model.attention.out_proj, SparseInt8Linear)
    x = torch.randn(2, 9, 64)
    close(model.attention(x, x.clone(), x)[0], model(x), 64 * 9)


def test_a_traced_mask_is_checked_when_it_runs() -> None:
    module = WindowSparseAttention(32, 4).eval()
    x = torch.randn(2, 9, 32)
    padded = torch.arange(9) >= torch.tensor([[9], [5]])

    def attend(x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = module(x, x, x, key_padding_mask=mask)[0]
        return out

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(x, padded), attend(x, padded), 32 * 9)
        with pytest.raises(RuntimeError, match="padding at the end"):
            compiled(x, padded.flip(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim: expected a multiple of num_heads = 5, got 32"),
        ({"dropout": 1.0}, "dropout: expected a rate"),
        ({"add_bias_kv": True}, "add_bias_kv: expected False"),
        ({"add_zero_attn": True}, "add_zero_attn: expected False"),
        ({"kdim": 16}, "kdim: expected None or embed_dim = 32, got 16"),
        ({"pattern": 3}, "pattern: expected an AttentionPattern"),
        ({"pattern": AttentionPattern(1, [[1], [2]])}, "pattern: expected offsets for num_heads"),
        ({"projection": "sparse"}, "projection: expected one of dense"),
        ({"projection": "low_rank"}, "rank: expected an integer"),
        ({"qk_rank": 9}, "qk_rank: expected at most embed_dim / num_heads = 8, got 9"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        WindowSparseAttention(**{"embed_dim": 32, "num_heads": 4} | options)


def test_bad_input() -> None:
    module = WindowSparseAttention(32, 4)
    x = torch.randn(2, 9, 32)
    with pytest.raises(ShapeError, match="query: expected shape"):
        module(torch.zeros(2, 9, 31))
    with pytest.raises(ShapeError, match="key: expected query's shape"):
        module(x, x[:, :4], x[:, :4])
    with pytest.raises(ShapeError, match="key_padding_mask: expected shape"):
        module(x, x, x, torch.zeros(9, 2, dtype=torch.bool))
    with pytest.raises(DtypeError, match="key_padding_mask: expected bool or"):
        module(x, x, x, torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ShapeError, match="attn_mask: expected shape"):
        module(x, x, x, attn_mask=torch.zeros(2, 9, 9))
    with pytest.raises(ArgumentError, match="is_causal: expected False, or a causal pattern"):
        module(x, x, x, is_causal=True)
    with pytest.raises(ArgumentError, match="lengths: expected None where"):
        module(x, lengths=torch.tensor([1, 2]), key_padding_mask=torch.zeros(2, 9).bool())
    for need_weights in (False, True):
        with pytest.raises(ArgumentError, match="lengths: expected"):
            module(x, lengths=torch.tensor([1, 10]), need_weights=need_weights)
    with pytest.raises(DtypeError, match=r"mha: expected a torch\.nn\.MultiheadAttention"):
        WindowSparseAttention.from_mha(nn.Linear(2, 2), WIDE)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="add_bias_kv"):
        WindowSparseAttention.from_mha(nn.MultiheadAttention(8, 2, add_bias_kv=True), WIDE)
    with pytest.raises(ArgumentError, match="mha: expected kdim and vdim"):
        WindowSparseAttention.from_mha(nn.MultiheadAttention(8, 2, kdim=4), WIDE)
