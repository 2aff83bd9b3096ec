"""The canonical ranker: size, shapes, masking, gradients, attention maps, export."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastrec.errors import ArgumentError, DtypeError, IdRangeError, ShapeError
from fastrec.models import (
    MODELS,
    Ranker,
    RankerConfig,
    fuse_attention_,
    record_attention,
    validate_inputs,
)

TINY = RankerConfig(
    n_items=60, n_categories=9, history_length=12, d=16, category_dim=8, ffn=32, tower=(24, 24)
)


def make_inputs(
    config: RankerConfig, batch: int, size: int, m: int, seed: int = 0
) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    item = torch.randint(1, config.n_items, (batch, size), generator=g)
    category = torch.randint(1, config.n_categories, (batch, size), generator=g)
    behaviour = torch.randint(1, config.n_behaviours + 1, (batch, size), generator=g)
    length = torch.randint(1, size + 1, (batch,), generator=g)
    cand_item = torch.randint(1, config.n_items, (batch, m), generator=g)
    cand_category = torch.randint(1, config.n_categories, (batch, m), generator=g)
    return item, category, behaviour, length, cand_item, cand_category


@pytest.fixture
def model() -> Ranker:
    torch.manual_seed(0)
    return Ranker(TINY).eval()


def test_canonical_size_is_32_million() -> None:
    config = RankerConfig.taobao()
    with torch.device("meta"):
        count = sum(p.numel() for p in Ranker(config).parameters())
    assert abs(count - 32.0e6) <= 0.1e6
    assert config.n_parameters() == count


@pytest.mark.parametrize(
    "config",
    [RankerConfig.taobao(), RankerConfig(1_000, 50), RankerConfig(64_000, 3_000), TINY],
)
def test_student_has_a_fifth_of_the_parameters_and_the_same_maps(config: RankerConfig) -> None:
    student = config.student() if config is not TINY else config.student(share=0.6)
    with torch.device("meta"):
        count = sum(p.numel() for p in Ranker(student).parameters())
    assert student.n_parameters() == count
    assert count <= (0.2 if config is not TINY else 0.6) * config.n_parameters()
    assert (student.n_blocks, student.n_heads) == (config.n_blocks, config.n_heads)
    if config == RankerConfig.taobao():
        assert count <= 6.4e6


def test_student_without_room_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="share"):
        TINY.student(share=0.001)


def test_config_round_trips_and_rejects_nonsense() -> None:
    assert RankerConfig.from_dict(TINY.to_dict()) == TINY
    assert MODELS["ranker"] == (Ranker, RankerConfig)
    for values in ({"d": 10}, {"n_items": 0}, {"tower": (0,)}, {"item_dim": 0}, {"dropout": 1.0}):
        with pytest.raises(ArgumentError, match=next(iter(values))):
            RankerConfig(**{"n_items": 5, "n_categories": 5, **values})
    with pytest.raises(ArgumentError, match="depth"):
        RankerConfig.from_dict({**TINY.to_dict(), "depth": 3})
    with pytest.raises(ArgumentError, match="n_items"):
        RankerConfig.from_dict({"n_categories": 3})


@pytest.mark.parametrize(
    ("batch", "size", "m"), list(itertools.product((1, 3), (1, 7, 12), (1, 5)))
)
def test_shapes_and_parts_agree(model: Ranker, batch: int, size: int, m: int) -> None:
    inputs = make_inputs(TINY, batch, size, m)
    with torch.no_grad():
        scores = model(*inputs)
        encoded = model.encode(*inputs[:4])
        parts = model.score(encoded, inputs[3], *inputs[4:])
    assert scores.shape == (batch, m)
    assert encoded.shape == (batch, size, TINY.d)
    assert torch.equal(scores, parts)


def test_what_lies_beyond_the_length_changes_nothing(model: Ranker) -> None:
    item, category, behaviour, length, *candidates = make_inputs(TINY, 4, 12, 5)
    length = torch.tensor([0, 1, 7, 11])
    beyond = torch.arange(12)[None] >= length[:, None]
    with torch.no_grad():
        scores = model(item, category, behaviour, length, *candidates)
        changed = model(
            torch.where(beyond, 0, item),
            torch.where(beyond, 0, category),
            torch.where(beyond, 0, behaviour),
            length,
            *candidates,
        )
        shorter = model(
            item[:3, :7],
            category[:3, :7],
            behaviour[:3, :7],
            length[:3],
            *(c[:3] for c in candidates),
        )
    assert torch.isfinite(scores).all()
    assert torch.allclose(scores, changed, atol=1e-6)
    assert torch.allclose(scores[:3], shorter, atol=1e-6)


def test_permuting_candidates_permutes_scores(model: Ranker) -> None:
    inputs = make_inputs(TINY, 3, 9, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = model(*inputs)
        permuted = model(*inputs[:4], inputs[4][:, order], inputs[5][:, order])
    assert torch.allclose(scores[:, order], permuted, atol=1e-6)


def test_history_order_matters(model: Ranker) -> None:
    item, category, behaviour, _, *candidates = make_inputs(TINY, 2, 9, 4)
    length = torch.tensor([9, 9])
    with torch.no_grad():
        scores = model(item, category, behaviour, length, *candidates)
        turned = model(item.flip(1), category.flip(1), behaviour.flip(1), length, *candidates)
    assert not torch.allclose(scores, turned, atol=1e-6)


def test_empty_history_is_finite_with_gradients() -> None:
    torch.manual_seed(0)
    model = Ranker(TINY)
    item, category, behaviour, length, *candidates = make_inputs(TINY, 2, 5, 3)
    scores = model(item, category, behaviour, torch.zeros_like(length), *candidates)
    scores.sum().backward()
    assert torch.isfinite(scores).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    for config in (TINY, TINY.student(share=0.6)):
        model = Ranker(config)
        inputs = make_inputs(config, 8, 12, 6)
        torch.nn.functional.cross_entropy(
            model(*inputs), torch.zeros(8, dtype=torch.long)
        ).backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # Two additive constants the softmax over candidates cannot see.
        assert set(silent) <= {f"tower.{len(model.tower) - 1}.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(model: Ranker, dtype: torch.dtype) -> None:
    inputs = make_inputs(TINY, 4, 12, 5)
    with torch.no_grad():
        exact = model(*inputs)
        rough = Ranker(TINY).to(dtype)
        rough.load_state_dict(model.state_dict())
        rough = rough.eval()(*inputs)
    assert rough.dtype == dtype
    # A few layers of rounding at 2^-8 (bf16) relative each.
    assert torch.allclose(exact, rough.float(), atol=0.1 * float(exact.abs().max()) + 0.02)


def test_fused_attention_agrees_and_leaves_other_dtypes_to_torch(model: Ranker) -> None:
    inputs = list(make_inputs(TINY, 4, 12, 5))
    inputs[3] = torch.tensor([0, 1, 7, 12])
    with torch.no_grad():
        plain = model(*inputs)
        fuse_attention_(model)
        fused = model(*inputs)
        rough = model.to(torch.bfloat16)(*inputs)
    # Both are fp32 with other orders of summation.
    assert torch.allclose(plain, fused, atol=1e-5, rtol=1e-5)
    assert rough.dtype == torch.bfloat16


def test_recorded_maps_are_the_attention_and_change_no_score(model: Ranker) -> None:
    inputs = make_inputs(TINY, 3, 9, 5)
    with torch.no_grad():
        plain = model(*inputs)
        with record_attention(model) as maps:
            recorded = model(*inputs)
        after = model(*inputs)
    assert [m.shape for m in maps] == [(3, 4, 9, 9)] * 2 + [(3, 4, 5, 9)]
    assert torch.allclose(plain, recorded, atol=1e-5)
    assert torch.equal(plain, after)
    for weights in (m.weights() for m in maps):
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        beyond = torch.arange(9)[None] >= inputs[3][:, None]
        assert weights.masked_select(beyond[:, None, None]).eq(0).all()


def test_training_and_inference_compute_the_same(model: Ranker) -> None:
    """Their attention takes different paths through torch."""
    inputs = make_inputs(TINY, 3, 9, 5)
    with torch.no_grad():
        assert torch.allclose(model(*inputs), model.train()(*inputs), atol=1e-5)


def test_a_fresh_model_already_finds_a_repeated_item() -> None:
    """Its cross attention starts as a look-up: the candidate's own event gets the most weight."""
    torch.manual_seed(0)
    model = Ranker(RankerConfig(n_items=500, n_categories=20, history_length=30)).eval()
    item, category, behaviour, _, cand_item, cand_category = make_inputs(model.config, 64, 30, 1)
    cand_item, cand_category = item[:, 7:8], category[:, 7:8]
    length = torch.full((64,), 30)
    with torch.no_grad(), record_attention(model) as maps:
        model(item, category, behaviour, length, cand_item, cand_category)
    found = maps[-1].weights().mean(1)[:, 0].argmax(-1)
    assert (found == 7).float().mean() > 0.9


def test_recorded_maps_carry_gradients() -> None:
    model = Ranker(TINY)
    with record_attention(model) as maps:
        model(*make_inputs(TINY, 2, 5, 3))
    maps[-1].weights().square().sum().backward()
    assert model.cross_attention.q_proj.weight.grad is not None


def test_torch_export_with_dynamic_batch(model: Ranker) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model, make_inputs(TINY, 3, 12, 5), dynamic_shapes=tuple({0: batch} for _ in range(6))
    )
    for size in (1, 4):
        inputs = make_inputs(TINY, size, 12, 5, seed=size)
        with torch.no_grad():
            assert torch.equal(program.module()(*inputs), model(*inputs))


def test_onnx_export_matches(model: Ranker, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "ranker.onnx"
    with warnings.catch_warnings():
        # The exporter and its libraries deprecate each other's interfaces.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            make_inputs(TINY, 3, 12, 5),
            dynamo=True,
            dynamic_shapes=tuple({0: "batch"} for _ in range(6)),
            verbose=False,
        )
        assert program is not None
        program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for size in (1, 5):
        inputs = make_inputs(TINY, size, 12, 5, seed=size)
        inputs[3][0] = 0
        feed = {n: t.numpy() for n, t in zip(names, inputs, strict=True)}
        with torch.no_grad():
            expected = model(*inputs).numpy()
        np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=1e-5)


def test_validate_accepts_good_inputs() -> None:
    validate_inputs(TINY, *make_inputs(TINY, 3, 12, 5))
    validate_inputs(TINY, *(t[:0] for t in make_inputs(TINY, 3, 12, 5)))


@pytest.mark.parametrize(
    ("index", "change", "error", "name"),
    [
        (0, lambda t: t.index_fill(1, torch.tensor([2]), 60), IdRangeError, "item"),
        (0, lambda t: -t, IdRangeError, "item"),
        (1, lambda t: t + 9, IdRangeError, "category"),
        (2, lambda t: t + 5, IdRangeError, "behaviour"),
        (3, lambda t: t + 12, IdRangeError, "length"),
        (3, lambda t: t - 13, IdRangeError, "length"),
        (4, lambda t: t + 60, IdRangeError, "cand_item"),
        (5, lambda t: t + 9, IdRangeError, "cand_category"),
        (0, lambda t: t.float(), DtypeError, "item"),
        (3, lambda t: t.to(torch.int32), DtypeError, "length"),
        (4, lambda t: t.tolist(), DtypeError, "cand_item"),
        (0, lambda t: t[0], ShapeError, "item"),
        (1, lambda t: t[:, 1:], ShapeError, "category"),
        (3, lambda t: t[:, None], ShapeError, "length"),
        (3, lambda t: t[1:], ShapeError, "length"),
        (4, lambda t: t[1:], ShapeError, "cand_item"),
        (4, lambda t: t[:, :0], ShapeError, "cand_item"),
        (5, lambda t: t[:, 1:], ShapeError, "cand_category"),
    ],
)
def test_validate_names_the_bad_input(index, change, error, name) -> None:  # type: ignore[no-untyped-def]
    inputs = list(make_inputs(TINY, 3, 12, 5))
    inputs[index] = change(inputs[index])
    with pytest.raises(error) as caught:
        validate_inputs(TINY, *inputs)
    assert caught.value.argument == name


def test_validate_rejects_a_history_longer_than_the_table() -> None:
    with pytest.raises(ShapeError, match="1\\.\\.12"):
        validate_inputs(TINY, *make_inputs(TINY, 3, 13, 5))
    with pytest.raises(ArgumentError, match="6 tensors"):
        validate_inputs(TINY, *make_inputs(TINY, 3, 12, 5)[:4])


def test_validate_rejects_mixed_devices() -> None:
    from fastrec.errors import DeviceError

    inputs = list(make_inputs(TINY, 3, 12, 5))
    inputs[4] = inputs[4].to("meta")
    with pytest.raises(DeviceError, match="cand_item"):
        validate_inputs(TINY, *inputs)
