"""The backend of torch.compile: the graphs of dynamo as plans, torch in between."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from idioms import close, draw, ids
from torch import nn

from fastrec.errors import FallbackWarning
from fastrec.runtime.native import graphs

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_memory(monkeypatch):
    """Each test meets a dynamo that has captured nothing, and is told everything anew."""
    torch._dynamo.reset()
    monkeypatch.setattr(graphs, "_told", set())
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced():
    """The graphs and plans that calls within a test make."""
    with graphs.collecting() as found:
        yield found


def compiled(model: nn.Module, **options) -> nn.Module:
    return torch.compile(model.eval(), backend=graphs.backend, **options)


def plans_of(found) -> list[int]:
    """How many plans each graph has."""
    return [len(plans.cut.regions) if plans.cut else 0 for _, plans in found]


class Block(nn.Module):
    """A layer whose code asks for values: dynamo ends a graph there."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.any():
            x = torch.where(hidden[..., None], 0.0, x)
        return self.norm(x + self.inner(x).relu())


class Stack(nn.Module):
    """Two layers that share their code, not their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.first, self.second = Block(), Block()

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        hidden = item == 0
        x = self.first(self.table(item), hidden)
        return self.second(x, hidden).mean(1)


class Whole(nn.Module):
    """One graph, which one plan holds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 16), nn.Sequential(nn.Linear(16, 8), nn.GELU())

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(item).mean(1))


class Cut(nn.Module):
    """One graph with an op that no plan holds."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, item: torch.Tensor) -> torch.Tensor:
        x = self.before(self.table(item)).sigmoid()
        return self.after(torch.cumprod(x, 1)).softmax(-1)


def test_graph_without_breaks_is_one_plan(traced):
    model = Whole()
    fast = compiled(model)
    with torch.no_grad():
        for batch in (3, 5, 9, 1):
            item = ids(50, batch, 6)
            close(f"B={batch}", fast(item), model(item))
    assert set(plans_of(traced)) == {1}
    assert all(plans.cut.ops[0] == plans.cut.ops[1] for _, plans in traced)


def test_both_branches_of_a_question_about_values(traced):
    model = Stack()
    fast = compiled(model)
    with torch.no_grad():
        for batch in (4, 6, 1):
            for padded in (True, False):
                item = ids(49, batch, 7) + 1
                if padded:
                    item[:, 2:4] = 0
                close(f"B={batch}, {padded}", fast(item), model(item))
    assert sum(plans_of(traced)) > 4


def test_layers_that_share_code_keep_their_own_weights(traced):
    model = Stack()
    fast = compiled(model)
    item = ids(49, 4, 7) + 1
    with torch.no_grad():
        fast(item)
        close("both layers", fast(item), model(item))
    layers = [p.cut for _, p in traced if p.cut and len(p.cut.regions) and len(p.order) > 3]
    assert len(layers) == 2


def test_op_that_no_plan_holds_is_cut_out_and_told(monkeypatch):
    model = Cut()
    fast = compiled(model)
    item = ids(50, 4, 6)
    with torch.no_grad(), pytest.warns(FallbackWarning, match=r"cumprod.*test_dynamo\.py:\d+"):
        first = fast(item)
    with torch.no_grad(), graphs.collecting() as found:
        close("again", fast(item), first)
        close("torch", first, model(item))
    assert plans_of(found) == [2]
    (_, plans), *_ = found
    assert plans.cut.ops[1] == plans.cut.ops[0] - 1


def test_free_sizes(traced):
    model = Stack()
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch, length in ((4, 7), (6, 5), (3, 12), (2, 2)):
            item = ids(49, batch, length) + 1
            close(f"{batch} x {length}", fast(item), model(item))
    assert sum(plans_of(traced)) > 0


def test_sizes_that_are_products(traced):
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.before(x).reshape(-1, 8)
            return self.after(torch.cumprod(rows, 1)).view(x.shape[0], x.shape[1], 3)

    model = Flattened()
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch, length in ((4, 7), (6, 5), (3, 12)):
            x = draw(batch, length, 8)
            close(f"{batch} x {length}", fast(x), model(x))
    assert sum(plans_of(traced)) >= 2


def test_numbers_made_of_free_sizes(traced):
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 4)

        def forward(self, item: torch.Tensor) -> torch.Tensor:
            near = item.clamp(max=item.shape[1] - 1)
            return self.out(self.table(near)).relu() / item.shape[1]

    model = Clamps()
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch, length in ((4, 7), (6, 5), (3, 12)):
            item = ids(50, batch, length)
            close(f"{batch} x {length}", fast(item), model(item))
    assert sum(plans_of(traced)) > 0


def test_graph_without_inputs(traced):
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(draw(8, 8))

        def forward(self) -> torch.Tensor:
            return (self.weight @ self.weight).relu()

    model = Squares()
    with torch.no_grad():
        close("squares", compiled(model)(), model())
    assert not traced[0][0].reason


def test_several_results_of_several_dtypes(traced):
    class Results(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, item: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.inner(x)
            best = y.argmax(-1)
            return {
                "scores": y,
                "best": best,
                "short": (best + item).to(torch.int32),
                "large": y > 0.5,
                "turned": y.transpose(0, 1).relu(),
                "one": y.sum(),
            }

    model = Results()
    fast = compiled(model)
    with torch.no_grad():
        for batch in (3, 5, 6):
            x, item = draw(batch, 4, 8), ids(9, batch, 4)
            ours, wanted = fast(x, item), model(x, item)
            close(f"B={batch}", ours, wanted)
            assert ours["turned"].stride() == wanted["turned"].stride()
    assert sum(plans_of(traced)) > 0


def test_results_that_share_memory_still_do(traced):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.inner(x).relu()
            return x[:, 1:], y, y.view(-1)

    fast = compiled(Views())
    x = draw(4, 8)
    with torch.no_grad():
        part, y, flat = fast(x)
        part.zero_()
        flat.zero_()
    assert x[:, 1:].abs().max() == 0
    assert y.abs().max() == 0
    assert sum(plans_of(traced)) == 1


def test_writing_into_an_input_is_done_by_torch(traced):
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1.0)
            return self.inner(x).relu()

    model = Writes()
    x = draw(4, 8)
    other = x.clone()
    with torch.no_grad():
        close("result", compiled(model)(x), model(other))
    close("the input", x, other)
    assert "writes into" in traced[0][0].reason


def test_values_that_plans_refuse_are_torchs_to_judge(traced):
    model = Whole()
    fast = compiled(model)
    item = ids(50, 4, 6)
    with torch.no_grad():
        fast(item)
        item[2, 3] = 50
        with pytest.raises(IndexError):
            fast(item)
        item[2, 3] = 0
        close("afterwards", fast(item), model(item))

    layer = nn.Linear(8, 8)
    numbers = compiled(layer)
    x = draw(4, 8)
    with torch.no_grad():
        numbers(x)
        x[1] = float("nan")
        close("NaN", numbers(x), layer(x))


def test_weights_that_change_are_seen(traced):
    model = Whole()
    fast = compiled(model)
    item = ids(50, 4, 6)
    with torch.no_grad():
        before = fast(item).clone()
        model.out[0].weight.mul_(2.0)
        close("in place", fast(item), model(item))
        model.load_state_dict({k: v + 0.5 for k, v in model.state_dict().items()})
        close("loaded", fast(item), model(item))
        model.out[0].weight.data = model.out[0].weight.data * 3.0
        close("replaced", fast(item), model(item))
        assert not torch.allclose(fast(item), before)


def test_gradients_run_in_torch_and_are_told_once():
    model = Whole()
    fast = compiled(model)
    item = ids(50, 4, 6)
    with pytest.warns(FallbackWarning, match="gradients are needed"):
        fast(item).sum().backward()
    ours = model.out[0].weight.grad.clone()
    model.zero_grad()
    model(item).sum().backward()
    close("gradient", ours, model.out[0].weight.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Whole())(ids(50, 3, 6)).sum().backward()
        with torch.no_grad():  # and then plans, of the trained weights
            close("inference", fast(item), model(item))


def test_inference_mode(traced):
    model = Stack()
    fast = compiled(model)
    with torch.inference_mode():
        for batch in (4, 6):
            item = ids(49, batch, 7) + 1
            close(f"B={batch}", fast(item), model(item))
    assert sum(plans_of(traced)) > 0


def test_float64_keeps_its_precision():
    model = Whole().double()
    fast = compiled(model)
    item = ids(50, 4, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        torch.testing.assert_close(fast(item), model(item), rtol=1e-12, atol=1e-12)


def test_threads_call_at_once():
    model = Stack()
    fast = compiled(model)
    requests = [ids(49, 4, 7, seed=s) + s % 2 for s in range(8)]
    with torch.no_grad():
        for item in requests:
            fast(item)
    wanted = [model(item).detach() for item in requests]
    right: list[bool] = []

    def client(n: int) -> None:
        with torch.no_grad():
            answers = [fast(requests[n]) for _ in range(20)]
        right.extend(torch.allclose(answer, wanted[n], atol=1e-5) for answer in answers)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 160


def test_torch_finds_the_backend_by_its_name(tmp_path):
    """As installed: torch reads the entry point; nobody imports fastrec."""
    tomllib = pytest.importorskip("tomllib")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (point,) = points["torch_dynamo_backends"].items()
    info = tmp_path / "installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\n{point[0]} = {point[1]}\n")
    code = (
        "import torch\n"
        "fast = torch.compile(torch.nn.Linear(8, 4).eval(), backend='fastrec')\n"
        "with torch.no_grad(): print(tuple(fast(torch.ones(3, 8)).shape))\n"
    )
    paths = f"{tmp_path}:{ROOT / 'src'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(3, 4)"
