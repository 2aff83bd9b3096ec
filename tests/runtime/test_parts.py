"""Models that are no single plan: engines of parts, with torch in between."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from idioms import close, draw, ids
from torch import nn

import fastrec
from fastrec.errors import BackendError, FallbackWarning, IdRangeError, ShapeError
from fastrec.runtime.engine import Engine
from fastrec.runtime.native import graphs

PARTS = {"executor": "parts"}


@pytest.fixture(autouse=True)
def no_memory():
    """Each test meets a dynamo that has captured nothing."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """Asks for a value in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.any():
            x = torch.where(hidden[..., None], 0.0, x)
        return x + self.inner(x).relu()


class Asks(nn.Module):
    """Two such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.first, self.second = Layer(), Layer()
        self.out = nn.Linear(16, 1)

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        hidden = item == 0
        x = self.second(self.first(self.table(item), hidden), hidden)
        return self.out(x.mean(1)).squeeze(-1)


class Loops(nn.Module):
    """Asks for a value within a loop, where dynamo captures nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if (x > 0).any():
                x = layer(x).relu()
        return x


class Counts(nn.Module):
    """Reads a number from a tensor, and slices by it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 16), nn.Linear(16, 4)

    def forward(self, item: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        longest = int(length.max().item())
        x = self.out(self.table(item[:, :longest])).tanh()
        keep = torch.arange(longest)[None] < length[:, None]
        return (x * keep[..., None]).sum(1)


class Packs(nn.Module):
    """Packed sequences, whose sizes depend on lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.cell = nn.GRU(8, 8, batch_first=True)
        self.out = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, item: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.table(item), length, batch_first=True, enforce_sorted=False
        )
        _, last = self.cell(packed)
        return self.out(last[0]).squeeze(-1)


class Chooses(nn.Module):
    """Rows that a mask chooses: a size that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.table(item)).relu()
        x[item == 0] = 1.5
        chosen = x[item > 0]
        return self.out(x.mean(1)) + chosen.mean()


class Recurrent(nn.Module):
    """A recurrent layer behind a number that is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell = nn.Embedding(50, 8), nn.GRU(8, 8, batch_first=True)

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        share = 1.0 / (1.0 + float((item > 0).sum().item()))
        return self.cell(self.table(item))[0][:, -1] * share


class Ranks(nn.Module):
    """Several results of several dtypes, and an op without a lowering."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 8)

    def forward(self, item: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.out(self.table(item)).sigmoid()
        y = torch.cumprod(x, -1)
        return {"scores": (x @ y.transpose(1, 2)).softmax(-1), "best": y.sum(-1).argmax(-1)}


def histories(batch: int, *, padded: bool = True, seed: int = 0) -> tuple[torch.Tensor]:
    item = ids(49, batch, 6, seed=seed) + 1
    if padded:
        item[:, 1] = 0
    return (item,)


def with_lengths(batch: int, *, padded: bool = True, seed: int = 0) -> tuple[torch.Tensor, ...]:
    length = ids(6, batch, seed=seed) + 1 if padded else torch.full((batch,), 6)
    return (*histories(batch, padded=False, seed=seed), length)


IDIOMS = {
    Asks: histories,
    Counts: with_lengths,
    Packs: with_lengths,
    Chooses: histories,
    Recurrent: histories,
    Ranks: histories,
}


@pytest.fixture
def model_of():
    """A model with weights that are the same each time."""

    def make(kind: type[nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return kind().eval()

    return make


def parts_of(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Engine:
    return fastrec.compile(model, inputs, "native", 2, settings=PARTS)


@pytest.mark.parametrize("kind", IDIOMS)
def test_right_for_other_batches_and_values(kind, model_of):
    model, inputs = model_of(kind), IDIOMS[kind]
    engine = parts_of(model, inputs(4))
    for batch in (4, 1, 2, 9, 11, 33):
        for padded in (True, False):
            request = inputs(batch, padded=padded, seed=batch)
            with torch.no_grad():
                close(f"B={batch}, {padded}", engine(*request), model(*request))


def test_parts_hold_what_torch_need_not(model_of):
    engine = parts_of(model_of(Asks), histories(4))
    rows = engine.describe()
    plans = [row["why"] for row in rows if row.get("setting") == "plan"]
    torchs = [row["why"] for row in rows if row.get("setting") == "torch"]
    assert any("inner" in why for why in plans)
    assert any("out" in why for why in plans)
    (why,) = torchs
    assert "a branch that depends on values (test_parts.py:" in why
    assert "torch.where(condition, a, b)" in why


def test_one_warning_names_all_ops_and_what_to_write(model_of, monkeypatch):
    class Both(Ranks):
        def forward(self, item: torch.Tensor) -> torch.Tensor:
            x = super().forward(item)["scores"]
            return torch.cummax(x, 1)[0][item[:, :6] > 0].sum() + x

    with pytest.warns(FallbackWarning) as told:
        engine = fastrec.compile(model_of(Both), histories(4), "native", 2)
    (warning,) = told
    text = str(warning.message)
    assert "cumprod" in text
    assert "cummax" in text
    assert "write a mask: torch.where(condition, x, 0)" in text
    assert "test_parts.py:" in text
    assert any("cumprod" in row["why"] for row in engine.describe())


def test_fallback_error_refuses(model_of):
    with pytest.raises(BackendError, match=r"cumprod.*test_parts\.py"):
        fastrec.compile(model_of(Ranks), histories(4), "native", 2, fallback="error")


def test_owns_its_weights(model_of):
    model = model_of(Asks)
    engine = parts_of(model, histories(4))
    before = engine(*histories(4)).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    close("after training", engine(*histories(4)), before)


def test_engines_of_one_class_keep_their_own_weights(model_of):
    first, second = model_of(Asks), Asks().eval()
    engines = [parts_of(model, histories(4)) for model in (first, second)]
    for batch in (4, 9, 1):
        with torch.no_grad():
            for model, engine in zip((first, second), engines, strict=True):
                close(f"B={batch}", engine(*histories(batch)), model(*histories(batch)))
    engines[1].close()
    with torch.no_grad():
        close("after the other's end", engines[0](*histories(3)), first(*histories(3)))


def test_serving_compiles_nothing(model_of, monkeypatch):
    model = model_of(Asks)
    engine = parts_of(model, histories(4))
    compiled = []
    monkeypatch.setattr(graphs, "DynamoGraph", lambda module: compiled.append(module))
    monkeypatch.setattr(graphs, "cut", lambda *of: compiled.append(of))
    for batch in (2, 3, 17):
        for padded in (True, False):
            request = histories(batch, padded=padded)
            with torch.no_grad():
                close(f"B={batch}, {padded}", engine(*request), model(*request))
    assert not compiled


def test_numpy_in_numpy_out(model_of):
    model = model_of(Asks)
    engine = parts_of(model, histories(4))
    request = histories(5)[0].numpy()
    scores = engine(request)
    assert isinstance(scores, np.ndarray)
    with torch.no_grad():
        np.testing.assert_allclose(scores, model(torch.from_numpy(request)), rtol=1e-4, atol=1e-5)


def test_bad_input_and_close(model_of, tmp_path):
    engine = parts_of(model_of(Asks), histories(4))
    with pytest.raises(ShapeError):
        engine(ids(50, 4, 7))
    with pytest.raises(IdRangeError, match="item"):
        engine(torch.full((4, 6), 50))
    engine(*histories(4))
    with pytest.raises(BackendError, match="no file of its own"):
        engine.save(tmp_path / "engine")
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine(*histories(4))


def test_threads_call_at_once(model_of):
    model = model_of(Asks)
    engine = parts_of(model, histories(4))
    requests = [histories(1 + n, padded=n % 2 == 0, seed=n) for n in range(6)]
    with torch.no_grad():
        wanted = [model(*request) for request in requests]
    right: list[bool] = []

    def client(n: int) -> None:
        answers = [engine(*requests[n]) for _ in range(20)]
        right.extend(torch.allclose(answer, wanted[n], atol=1e-5) for answer in answers)

    before = torch.get_num_threads()
    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 120
    assert torch.get_num_threads() == before


def test_structured_inputs_and_results(model_of):
    class Structured(Asks):
        def forward(self, batch: dict) -> dict:
            return {"score": super().forward(batch["item"]), "first": batch["item"][:, 0]}

    model = model_of(Structured)
    engine = parts_of(model, ({"item": histories(4)[0]},))
    for size in (4, 7):
        request = {"item": histories(size)[0]}
        with torch.no_grad():
            close(f"B={size}", engine(request), model(request))


def test_quantised_layers_run_in_parts(model_of):
    model = model_of(Asks)
    fastrec.quantize_(model, fastrec.Int8(), calibration=[histories(8, seed=s) for s in range(4)])
    engine = parts_of(model, histories(4))
    assert engine.precision == "int8"
    with torch.no_grad():
        close("int8", engine(*histories(5)), model(*histories(5)))


def test_model_that_takes_no_other_batch(model_of):
    class Fixed(Asks):
        def forward(self, item: torch.Tensor) -> torch.Tensor:
            if len(item) != 4:
                raise RuntimeError("four users, please")
            return super().forward(item)

    engine = parts_of(model_of(Fixed), histories(4))
    with torch.no_grad():
        close("four", engine(*histories(4)), model_of(Fixed)(*histories(4)))
    (row,) = [row for row in engine.describe() if row.get("setting") == "free sizes"]
    assert "four users, please" in row["why"]


class Sorts(nn.Module):
    """Nothing that a plan holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cummax(x, 1)[0] * float(x.sum().item())


@pytest.mark.parametrize("kind", [Sorts, Loops])
def test_nothing_to_take_apart(kind, model_of):
    model, x = model_of(kind), draw(3, 16)
    with pytest.raises(BackendError, match=r"no part of this model is a native plan: \w+"):
        parts_of(model, (x,))
    with pytest.warns(FallbackWarning) as told:
        engine = fastrec.compile(model, (x,), "native", 1)
    assert len(told) == 1
    with torch.no_grad():
        close("torch", engine(draw(5, 16)), model(draw(5, 16)))
