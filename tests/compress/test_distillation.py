"""distill: each loss against its definition, pairing of maps, a student that learns, refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrec.compress import AttentionMapKL, HardLabel, LogitKL, distill, distillation_loss
from fastrec.compress.distillation import Forward, map_divergence, pair_maps
from fastrec.errors import ArgumentError, DtypeError, ShapeError
from fastrec.models import Ranker, RankerConfig
from fastrec.train import TrainConfig

CONFIG = RankerConfig(
    n_items=60, n_categories=8, history_length=10, d=16, category_dim=4, ffn=32, tower=(32,)
)


class Batch(SimpleNamespace):
    def inputs(self) -> tuple[Tensor, ...]:
        return (
            self.item,
            self.category,
            self.behaviour,
            self.length,
            self.cand_item,
            self.cand_category,
        )


def batch(seed: int = 0, n: int = 16, m: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(1, high, shape, generator=generator)

    length = torch.randint(0, 11, (n,), generator=generator)
    valid = torch.arange(10) < length[:, None]
    return Batch(
        item=ids(60, n, 10) * valid,
        category=ids(8, n, 10) * valid,
        behaviour=ids(5, n, 10) * valid,
        length=length,
        cand_item=ids(60, n, m),
        cand_category=ids(8, n, m),
        label=torch.randint(0, m, (n,), generator=generator),
    )


def pair() -> tuple[Ranker, Ranker]:
    torch.manual_seed(0)
    student = RankerConfig(**{**CONFIG.to_dict(), "n_blocks": 1, "n_heads": 2, "d": 8})
    return Ranker(student), Ranker(CONFIG)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_logit_kl_is_its_definition_and_zero_for_a_twin() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    value = LogitKL(temperature=3.0)(Forward(student), Forward(teacher))
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    torch.testing.assert_close(value, 9 * (p * (p / q).log()).sum() / 5)
    assert LogitKL()(Forward(teacher), Forward(teacher)).abs() < 1e-6
    with pytest.raises(ShapeError, match="student"):
        LogitKL()(Forward(student[:, :3]), Forward(teacher))


def test_map_divergence_counts_valid_rows_only() -> None:
    student, teacher = maps(2, 4, 6, 6), maps(2, 4, 6, 6, seed=1)
    length = torch.tensor([6, 2])
    rows = (teacher * (teacher / student).log()).sum(-1)  # [B, H, L]
    expected = (rows[0].sum() + rows[1, :, :2].sum()) / (4 * 8)
    torch.testing.assert_close(map_divergence(student, teacher, length), expected)
    changed = student.clone()
    changed[1, :, 2:] = maps(4, 4, 6, seed=5)
    assert torch.equal(map_divergence(changed, teacher, length), expected) or torch.isclose(
        map_divergence(changed, teacher, length), expected
    )
    cross = map_divergence(student[:, :, :3], teacher[:, :, :3], torch.tensor([6, 0]))
    torch.testing.assert_close(cross, rows[0, :, :3].mean())
    none = map_divergence(student, teacher, torch.tensor([0, 0]))
    assert float(none) == 0.0


@pytest.mark.parametrize(("own", "target"), [(2, 4), (4, 2), (4, 6), (1, 3)])
def test_heads_are_averaged_where_their_numbers_differ(own: int, target: int) -> None:
    student, teacher = maps(3, own, 5, 5), maps(3, target, 5, 5, seed=1)
    value = map_divergence(student, teacher, None)
    assert value > 0
    n = min(own, target) if max(own, target) % min(own, target) == 0 else 1
    a, b = student.view(3, n, -1, 5, 5).mean(2), teacher.view(3, n, -1, 5, 5).mean(2)
    torch.testing.assert_close(value, (b * (b / a).log()).sum(-1).mean())


def test_keys_the_student_cannot_see_stay_finite() -> None:
    student = torch.tensor([[[[1.0, 0.0]]]], requires_grad=True)
    value = map_divergence(student, torch.tensor([[[[0.5, 0.5]]]]), None)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_maps_are_paired_by_shape_last_with_last() -> None:
    encoder, cross = maps(1, 2, 10, 10), maps(1, 2, 6, 10)
    assert pair_maps([encoder, cross], [encoder] * 3 + [cross]) == [(0, 2), (1, 3)]
    assert pair_maps([encoder] * 2, [encoder] * 4) == [(0, 1), (1, 3)]
    with pytest.raises(ArgumentError, match="student"):
        pair_maps([cross], [encoder])
    with pytest.raises(ArgumentError, match="AttentionMapKL"):
        pair_maps([], [])


def test_student_learns_from_its_teacher_which_stays_as_it_was() -> None:
    student, teacher = pair()
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    loader = [batch(seed) for seed in range(12)]
    losses = [HardLabel(weight=0.0), LogitKL(), AttentionMapKL()]
    config = TrainConfig(epochs=1, lr=3e-3, amp=False)
    first = distill(student, teacher, loader, losses, config=config)
    last = distill(student, teacher, loader, losses, config=TrainConfig(epochs=8, lr=3e-3))
    assert set(first.losses) == {"LogitKL", "AttentionMapKL"}
    assert all(last.losses[name] < first.losses[name] for name in first.losses)
    assert first.train.steps == 12
    assert teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_plain_models_distil_by_logits_and_labels() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Linear(8, 3), nn.Linear(8, 3)
    loader = [(torch.randn(32, 8), torch.randint(0, 3, (32,))) for _ in range(30)]
    config = TrainConfig(lr=3e-2, max_steps=60, epochs=2)
    report = distill(student, teacher, loader, [LogitKL()], config=config)
    assert report.losses["LogitKL"] < 0.1
    assert report.to_dict()["train"]["steps"] == 60
    once = distill(student, teacher, iter(loader), [LogitKL()], config=TrainConfig(max_steps=5))
    assert once.train.steps == 5


def test_refusals() -> None:
    student, teacher = pair()
    with pytest.raises(ArgumentError, match="another model"):
        distill(teacher, teacher, [batch()])
    with pytest.raises(ArgumentError, match="loader"):
        distill(student, teacher, [])
    with pytest.raises(ArgumentError, match="loader"):
        distill(student, teacher, iter([batch()]))
    with pytest.raises(DtypeError, match="losses"):
        distillation_loss(teacher, ["kl"])
    with pytest.raises(ArgumentError, match="temperature"):
        LogitKL(temperature=0)
    with pytest.raises(ArgumentError, match="weight"):
        AttentionMapKL(weight=float("nan"))
    with pytest.raises(ArgumentError, match="label"):
        distill(nn.Linear(2, 2), nn.Linear(2, 2), [torch.ones(4, 2)], [HardLabel()])
    with pytest.raises(ArgumentError, match="layers"):
        distill(student, teacher, [batch()], [AttentionMapKL(layers=((0, 9),))])


@settings(max_examples=40, deadline=None)
@given(
    masks=st.lists(st.sampled_from(["", "student", "teacher", "both"]), min_size=2, max_size=6),
    temperature=st.floats(0.5, 4.0),
)
def test_candidates_masked_with_infinity_have_no_part_in_the_logit_loss(
    masks: list[str], temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, len(masks), generator=generator)
    student, teacher = scores[0].clone(), scores[1].clone()
    for column, mask in enumerate(masks):
        if mask in ("student", "both"):
            student[:, column] = -torch.inf
        if mask in ("teacher", "both"):
            teacher[:, column] = -torch.inf
    student.requires_grad_()
    loss = LogitKL(temperature)(Forward(student), Forward(teacher))
    loss.backward()
    kept = [column for column, mask in enumerate(masks) if not mask]
    if kept:
        small = LogitKL(temperature)(Forward(scores[0][:, kept]), Forward(scores[1][:, kept]))
        torch.testing.assert_close(loss.detach(), small)
    else:
        assert float(loss.detach()) == 0.0
    assert bool(torch.isfinite(student.grad).all())
    assert not bool(student.grad[:, [c for c, mask in enumerate(masks) if mask]].any())


def test_a_student_may_share_only_frozen_parameters_with_its_teacher() -> None:
    table = nn.Embedding(50, 8)
    student, teacher = (nn.Sequential(table, nn.Linear(8, 4)) for _ in range(2))
    loader = [(torch.arange(8), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(ArgumentError, match=r"parameters of its own.*'0.weight'"):
        distill(student, teacher, loader, [LogitKL()])
    table.weight.requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    distill(student, teacher, loader, [LogitKL()])
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
