"""HiddenStates: any width, any model, lengths; maps compared over the student's pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastrec.compress import HiddenStates, distill
from fastrec.compress.distillation import map_divergence
from fastrec.compress.hidden_states import hidden_distance, pair_layers
from fastrec.errors import ArgumentError, ShapeError
from fastrec.train import TrainConfig


class Plain(nn.Module):
    """Not one of ours: layers in a ModuleList."""

    def __init__(self, d: int, depth: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter, self.leave = nn.Linear(8, d), nn.Linear(d, 4)
        self.layers = nn.ModuleList(nn.Linear(d, d) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.leave(x)


def test_layers_are_paired_the_last_with_the_last() -> None:
    pairs = pair_layers(Plain(8, 2, 0), Plain(16, 5, 1))
    assert pairs == (("layers.0", "layers.2"), ("layers.1", "layers.4"))


def test_a_narrow_shallow_student_learns_the_teachers_states() -> None:
    teacher, student = Plain(24, 4, 0).eval(), Plain(12, 2, 1)
    generator = torch.Generator().manual_seed(2)
    loader = [(torch.randn(64, 8, generator=generator), torch.zeros(64)) for _ in range(60)]

    def distance() -> float:
        with torch.no_grad():
            states = []
            for model, name in ((student, "layers.1"), (teacher, "layers.3")):
                found: list[Tensor] = []
                hook = model.get_submodule(name).register_forward_hook(
                    lambda m, a, out, found=found: found.append(out)
                )
                model(loader[0][0])
                hook.remove()
                states += found
            return float(hidden_distance(*states, None))

    before = distance()
    config = TrainConfig(epochs=2, lr=1e-2, amp=False)
    report = distill(student, teacher, loader, [HiddenStates()], config=config)
    assert distance() < 0.7 * before
    assert report.losses["HiddenStates"] < 1
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_a_linear_map_of_the_teachers_states_is_no_distance() -> None:
    torch.manual_seed(0)
    wide = torch.randn(4, 50, 6) @ torch.randn(6, 16)
    narrow = wide @ torch.randn(16, 6)
    # The ridge, 1e-4 of the mean square, is all that is left.
    assert float(hidden_distance(narrow, wide, None)) < 1e-2
    assert float(hidden_distance(wide, wide, None)) == 0
    assert float(hidden_distance(torch.randn(4, 50, 6), wide, None)) > 0.5


def test_rows_beyond_the_length_do_not_count() -> None:
    torch.manual_seed(1)
    own, guide, length = torch.randn(2, 5, 4), torch.randn(2, 5, 4), torch.tensor([3, 0])
    before = hidden_distance(own, guide, length)
    own[0, 3:], own[1] = torch.nan, torch.nan
    guide[0, 3:] = 1e9
    assert torch.equal(hidden_distance(own, guide, length), before)


def test_names_that_are_no_modules_and_other_shapes_are_refused() -> None:
    student, teacher = Plain(8, 2, 0), Plain(8, 2, 1)
    loader = [(torch.randn(4, 8), torch.zeros(4))]
    bad = HiddenStates(layers=(("layers.0", "layers.7"),))
    with pytest.raises(ArgumentError, match="teacher"):
        distill(student, teacher, loader, [bad])
    with pytest.raises(ArgumentError, match="ModuleList"):
        distill(nn.Linear(8, 4), teacher, loader, [HiddenStates()])
    with pytest.raises(ShapeError, match="student"):
        hidden_distance(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4), None)


def test_maps_are_compared_over_the_students_pattern() -> None:
    torch.manual_seed(0)
    seen = torch.eye(5, dtype=torch.bool) | torch.eye(5, dtype=torch.bool).roll(1, 0)
    scores = torch.randn(1, 2, 5, 5)
    teacher = scores.softmax(-1)
    student = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    # The student has the teacher's scores: over what it sees there is nothing left to learn.
    assert float(map_divergence(student, teacher, None)) == pytest.approx(0, abs=1e-6)
    other = torch.randn(1, 2, 5, 5).masked_fill(~seen, -torch.inf).softmax(-1)
    assert float(map_divergence(other, teacher, None)) > 0.01
