"""Engines of models whose code depends on values: right on other inputs too, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from idioms import ids
from torch import Tensor, nn

import fastrec
from fastrec.errors import BackendError, FallbackWarning, FastrecError, IdRangeError
from fastrec.runtime import available_backends
from fastrec.runtime.unlike import require_agreement, unlike

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in available_backends().items()
    if name in ("native", "onnxruntime", "openvino", "torch")
]


def longest(model: Depends, item: Tensor) -> Tensor:
    """Cut to the longest history, whose last item counts twice."""
    length = int((item > 0).sum(1).max())
    h = model.items(item[:, : max(length, 1)])
    return h.sum(1) + h[:, -1]


def padded(model: Depends, item: Tensor) -> Tensor:
    h = model.items(item).sum(1)
    return h * 3 if (item == 0).any() else h


def number(model: Depends, item: Tensor) -> Tensor:
    return model.items(item).sum(1) * float((item > 0).sum().item())


def alone(model: Depends, item: Tensor) -> Tensor:
    h = model.items(item)
    return h.sum(1) if item.shape[0] == 1 else h.amax(1)


class Depends(nn.Module):
    def __init__(self, scores: Callable[[Depends, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.items = nn.Embedding(50, 8)
        self.out = nn.Linear(8, 4)
        self.scores = scores

    def forward(self, item: Tensor) -> Tensor:
        return self.out(self.scores(self, item))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scores", [longest, padded, number, alone])
def test_what_a_tracer_took_for_a_constant(
    scores: Callable[[Depends, Tensor], Tensor], backend: str
) -> None:
    model = Depends(scores).eval()
    full, short = 1 + ids(49, 4, 6), 1 + ids(49, 4, 6)
    short[:, 4:] = 0
    built = 0
    for examples in (full, short, short[:1]):
        try:
            engine = fastrec.compile(model, (examples,), backend, 1)
        except BackendError:
            continue
        except FallbackWarning:
            continue  # op by op in torch: right
        built += 1
        for other in (full, short, short[:1], torch.zeros(3, 6, dtype=torch.int64)):
            try:
                found = engine(other)
            except FastrecError:
                continue
            with torch.inference_mode():
                torch.testing.assert_close(found, model(other), rtol=1e-4, atol=1e-4)
    assert built == 3 or backend != "torch"


def test_the_message_says_on_which_inputs_an_engine_is_wrong() -> None:
    model = Depends(padded).eval()
    examples = (1 + ids(49, 4, 6),)

    def engine(item: Tensor) -> Tensor:
        return model.out(model.items(item).sum(1))

    with (
        torch.inference_mode(),
        pytest.raises(BackendError, match=r"empty and short histories.*operations on tensors"),
    ):
        require_agreement("traced", engine, model, examples, 4, "fp32")
    with torch.inference_mode():
        require_agreement("right", model, model, examples, 4, "fp32")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_other_inputs_have_the_examples_dtypes_and_sizes(batch: int) -> None:
    table = torch.randn(7, 3)
    examples = (ids(9, batch, 6), torch.randn(batch, 6), torch.rand(batch, 6) > 0.5, table)
    for what, inputs in unlike(examples, batch):
        for given, example in zip(inputs, examples, strict=True):
            assert given.dtype == example.dtype, what
            assert given.shape[1:] == example.shape[1:], what
        sizes = {len(t) for t in inputs[:3]}
        assert sizes == ({1 if batch > 1 else 2} if "batch" in what else {batch})
        if batch != 7:
            assert len(inputs[3]) == 7


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_outside_their_table_are_refused_alike(backend: str, int8: bool) -> None:
    model = Depends(lambda own, item: own.items(item).sum(1)).eval()
    examples = ids(50, 4, 6)
    if int8:
        every = fastrec.Int8()
        fastrec.quantize_(model, every, [(examples,)], lambda m, name: name == "items")
    engine = fastrec.compile(model, (examples,), backend, 1)
    for bad in (50, -1, 2**40):
        broken = examples.clone()
        broken[1, 2] = bad
        with pytest.raises(IdRangeError, match="ids"):
            engine(broken)
    with torch.inference_mode():
        torch.testing.assert_close(engine(examples), model(examples), rtol=1e-4, atol=1e-5)


def test_hidden_candidates_may_have_a_score_of_minus_infinity() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(50, 8)

        def forward(self, item: Tensor) -> Tensor:
            return self.items(item).sum(-1).masked_fill(item == 0, float("-inf"))

    model = Masked().eval()
    examples = ids(3, 4, 6)
    engine = fastrec.compile(model, (examples,), "native", 1, fallback="error")
    with torch.inference_mode():
        torch.testing.assert_close(engine(examples), model(examples), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(bool(available_backends()["openvino"]), reason="no OpenVINO")
def test_what_a_library_raises_is_a_backend_error() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).trunc().sum(1)  # neither has a rule in OpenVINO

    with pytest.raises(BackendError, match=r"openvino.*(mT|trunc|convert)"):
        fastrec.compile(Unknown(), (torch.randn(3, 4, 5),), "openvino", 1)
