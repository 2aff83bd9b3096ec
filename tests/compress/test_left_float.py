"""Layers that a verb cannot change are left, named with the reason, and give the right scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations as parametrise
from torch.nn.utils import prune as torch_prune
from torch.nn.utils import weight_norm as old_weight_norm

import fastrec
from fastrec import QAT, BlockPruning, Int8, LowRank
from fastrec.errors import ArgumentError, DtypeError
from fastrec.nn import GroupedLinear, SparseInt8Linear

PRUNING = BlockPruning(0.4, block=(8, 4))


class Tower(nn.Module):
    """Three layers of 64; ``wrap`` changes the second."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(64, 64) for _ in range(3))
        self.second = wrap(self.second)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 64, generator=generator) for _ in range(3)]


def close(model: nn.Module, expected: Tensor, x: Any, share: float = 0.05) -> bool:
    """Within a share of the largest expected score; INT8 with its 8 bits stays far below it."""
    with torch.no_grad():
        found = model(x)
    return bool((found - expected).abs().max() <= share * expected.abs().max())


def with_torch_pruning(layer: nn.Module) -> nn.Module:
    torch_prune.l1_unstructured(layer, "weight", 0.3)
    return layer


REPARAMETRISED = {
    "weight_norm": parametrise.weight_norm,
    "spectral_norm": parametrise.spectral_norm,
    "orthogonal": parametrise.orthogonal,
    "old spectral_norm": nn.utils.spectral_norm,
    "torch's prune": with_torch_pruning,
}


@pytest.mark.parametrize("kind", REPARAMETRISED)
def test_reparametrised_layers(kind: str) -> None:
    def fresh() -> nn.Module:
        return Tower(REPARAMETRISED[kind]).eval()

    model, x = fresh(), batches()[0]
    with torch.no_grad():
        before = (model(x), model.second.weight.clone())[1]
    report = fastrec.prune_(model, PRUNING)
    assert "computed from other parameters" in report.left["second"]
    assert set(report.layers) == {"first.weight", "last.weight"}
    with torch.no_grad():
        model(x)
    torch.testing.assert_close(model.second.weight.detach(), before)
    for name in ("first", "last"):
        zeros = (model.get_submodule(name).weight == 0).float().mean()
        assert float(zeros) == pytest.approx(1 - report.layers[f"{name}.weight"].kept)
    with pytest.raises(ArgumentError, match=r"second.*: its weight is computed"):
        fastrec.prune_(fresh(), PRUNING, "second")

    model = fresh()
    report = fastrec.quantize_(model, QAT("prepare"), batches())
    assert report.prepared == ["first", "last"]
    assert "computed from other parameters" in report.left["second"]
    with torch.no_grad():
        expected = model(x)
    fastrec.quantize_(model, QAT("convert"))
    assert close(model, expected, x)

    model = fresh()
    with torch.no_grad():
        expected = model(x)
    assert "second" in fastrec.quantize_(model, Int8(), batches()).layers
    assert close(model, expected, x)

    chain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), REPARAMETRISED[kind](nn.Linear(64, 64)))
    with pytest.raises(ArgumentError, match="'2': its weight is computed from other"):
        fastrec.student(chain, width=0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_old_weight_norm_too() -> None:
    model = Tower(old_weight_norm).eval()
    assert "second" in fastrec.prune_(model, PRUNING).left
    assert "second" in fastrec.quantize_(model, QAT("prepare"), batches()).left


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_weights_in_any_memory_order_are_pruned(scope: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), GroupedLinear(64, 64, 2), nn.Linear(64, 64))
    model[0].weight = nn.Parameter((torch.randn(64, 64) * 0.1).t())
    model[1].weight = nn.Parameter((torch.randn(2, 32, 32) * 0.1).transpose(1, 2))
    report = fastrec.prune_(model, BlockPruning(0.4, block=(8, 4), scope=scope))
    for index in range(3):
        zeros = float((model[index].weight == 0).float().mean())
        assert zeros == pytest.approx(1 - report.layers[f"{index}.weight"].kept, abs=1e-6)
        assert zeros > 0.1
    model[0].weight = nn.Parameter(torch.randn(64, 1).expand(64, 64))
    assert "share memory" in fastrec.prune_(model, PRUNING).left["0"]
    with torch.inference_mode():
        frozen = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ArgumentError, match="inference_mode"):
        fastrec.prune_(frozen, PRUNING)
    with pytest.raises(ArgumentError, match="run a batch first"):
        fastrec.prune_(nn.Sequential(nn.LazyLinear(64)), PRUNING)


class Tied(nn.Module):
    """Scores the whole catalogue with the items' own table, one spelling of many."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spelling = spelling
        self.items, self.layer = nn.Embedding(1200, 32, padding_idx=0), nn.Linear(32, 32)
        self.head = nn.Linear(32, 1200, bias=False)
        self.head.weight = self.items.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden, table = self.layer(self.items(ids)).mean(1), self.items.weight
        if self.spelling == "head":
            return self.head(hidden)
        spellings: dict[str, Callable[[], Tensor]] = {
            "matmul": lambda: hidden @ table.T,
            "cast": lambda: hidden @ table.T.to(hidden.dtype),
            "linear": lambda: F.linear(hidden, table),
            "type_as": lambda: F.linear(hidden, table.type_as(hidden)),
            "einsum": lambda: torch.einsum("bd,vd->bv", hidden, table),
            "float": lambda: hidden @ table.float().t(),
            "keyword": lambda: F.linear(hidden, weight=table),
            "cat": lambda: hidden @ torch.cat([table, table])[:1200].T,
        }
        return spellings[self.spelling]()


SPELLINGS = ["matmul", "cast", "linear", "type_as", "einsum", "float", "keyword", "cat", "head"]


@pytest.mark.parametrize("qat", [None, "calibrated", "uncalibrated"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_tied_scoring(spelling: str, qat: str | None) -> None:
    ids = [
        torch.randint(1, 1200, (8, 10), generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    model = Tied(spelling).eval()
    with torch.no_grad():
        expected = model(ids[0])
    if qat is None:
        report = fastrec.quantize_(model, Int8(), ids)
    else:
        fastrec.quantize_(model, QAT("prepare"), ids if qat == "calibrated" else None)
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), 1e-4)
        for batch in ids:
            model(batch).square().mean().backward()
            optimiser.step()
        with torch.no_grad():
            expected = model.eval()(ids[0])
        report = fastrec.quantize_(model, QAT("convert"))
    assert close(model, expected, ids[0])
    if spelling == "head":
        assert report.tables == ["items"]
        assert "head" in report.layers
    else:
        assert type(model.items) is nn.Embedding
        if qat != "calibrated":  # then "prepare" told so
            assert "used outside of its own call" in report.left["items"]
        assert model.items.weight.requires_grad


class Asking(nn.Module):
    """A parent that asks a layer's weight for a property, or takes its norm."""

    def __init__(self, question: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.question = question
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden, weight = torch.relu(self.inner(x)), self.outer.weight
        if self.question == "norm":
            return self.outer(hidden) + weight.norm()
        if self.question == "shape":
            return self.outer(hidden) * weight.shape[0]
        return self.outer(hidden.to(getattr(weight, self.question)))


@pytest.mark.parametrize("question", ["dtype", "device", "shape", "norm"])
def test_parents_that_ask_for_a_weights_properties(question: str) -> None:
    model, x = Asking(question).eval(), batches()
    with torch.no_grad():
        expected = model(x[0])
    report = fastrec.quantize_(model, Int8(), x)
    assert close(model, expected, x[0])
    assert ("outer" in report.layers) == (question != "norm")
    assert ("outer" in report.left) == (question == "norm")


def test_layers_that_calibration_says_nothing_of() -> None:
    class Cold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.all, self.cold, self.zero = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x: Tensor, cold: Tensor) -> Tensor:
            y = self.all(x).clone() + self.zero(x * cold[:, None])
            y[cold] += self.cold(x[cold])
            return y

    model, x = Cold().eval(), torch.randn(64, 32)
    some = torch.arange(64) % 2 == 0
    with torch.no_grad():
        expected = model(x, some)
    report = fastrec.quantize_(model, Int8(), [(x, torch.zeros(64, dtype=torch.bool))])
    assert set(report.layers) == {"all"}
    assert report.left == {
        "cold": "its input was empty in every calibration batch",
        "zero": "its input was 0 in every calibration batch",
    }
    with torch.no_grad():
        assert (model(x, some) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", [Int8(), QAT("prepare")])
def test_models_of_other_dtypes_are_refused_untouched(dtype: torch.dtype, config: Any) -> None:
    model = Tower().to(dtype)
    with pytest.raises(DtypeError, match=r"float32 layers: model.float\(\).* in 'first'"):
        fastrec.quantize_(model, config, [x.to(dtype) for x in batches()])
    assert all(type(m) in (Tower, nn.Linear) for m in model.modules())
    mixed = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).to(dtype))
    fastrec.quantize_(mixed[:1], Int8(), batches())
    assert isinstance(mixed[0], SparseInt8Linear) or type(mixed[0]) is nn.Linear


def triple(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 3


def triple_input(module: nn.Module, args: Any) -> Any:
    return (args[0] * 3,)


def add_hook(model: nn.Module, kind: str, place: str) -> None:
    module = model.get_submodule(place)
    if kind == "hook":
        module.register_forward_hook(triple)
    elif kind == "pre-hook":
        module.register_forward_pre_hook(triple_input)
    else:
        old = module.forward
        module.forward = lambda *args: old(*args) * 3  # type: ignore[method-assign]


class Everyday(nn.Module):
    """A table, a norm, a chain, a residual and a score."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items, self.norm = nn.Embedding(1200, 64), nn.LayerNorm(64)
        self.layer = nn.Linear(64, 64)
        self.chain = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64))
        self.score = nn.Linear(64, 1)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.items(ids).mean(1)
        return self.score(self.chain(self.norm(hidden + self.layer(hidden)))).squeeze(-1)


PLACES = ["items", "norm", "layer", "chain.0", "chain.1", "chain.2", "chain.3", "chain", "score"]


@settings(max_examples=25, deadline=None)
@given(
    hooks=st.lists(
        st.tuples(st.sampled_from(["hook", "patch"]), st.sampled_from(PLACES)), max_size=3
    ),
    verb=st.sampled_from(["int8", "qat", "low rank"]),
)
def test_hooks_and_patched_forwards_survive_every_verb(
    hooks: list[tuple[str, str]], verb: str
) -> None:
    ids = torch.randint(1200, (16, 8), generator=torch.Generator().manual_seed(1))
    model = Everyday().eval()
    for kind, place in hooks:
        add_hook(model, kind, place)
    with torch.no_grad():
        expected = model(ids)
    if verb == "low rank":
        report = fastrec.replace_(model, LowRank(31), "chain") if _open(hooks, "chain.0") else None
        left = {} if report is None else report.left
    else:
        left = fastrec.quantize_(model, Int8() if verb == "int8" else QAT("prepare"), [ids]).left
        with torch.no_grad():
            prepared = model(ids)
        if verb == "qat":
            fastrec.quantize_(model, QAT("convert"))
            assert close(model, prepared, ids)
        assert close(model, expected, ids, share=0.1)
    for _, place in hooks:
        swapped = place in ("items", "layer", "chain.0", "chain.3") and verb != "low rank"
        assert not swapped or place in left


def _open(hooks: list[tuple[str, str]], place: str) -> bool:
    return all(place != hooked for _, hooked in hooks)


def test_pre_hooks_survive() -> None:
    x, model = batches(), Tower().eval()
    add_hook(model, "pre-hook", "second")
    with torch.no_grad():
        expected = model(x[0])
    assert "hooks" in fastrec.quantize_(model, Int8(), x).left["second"]
    assert close(model, expected, x[0])
    model = Tower().eval()
    fastrec.quantize_(model, QAT("prepare"), x)
    add_hook(model, "hook", "second")
    with pytest.raises(ArgumentError, match="'second': it has hooks"):
        fastrec.quantize_(model, QAT("convert"))


def test_a_gradient_through_static_int8_is_an_error_that_names_qat() -> None:
    ids = torch.randint(1200, (16, 8))
    model = Everyday()
    fastrec.quantize_(model, Int8(), [ids])
    model.train()
    loss = model(ids).square().mean()  # the forward pass alone works, as for an evaluation
    with pytest.raises(ArgumentError, match=r"QAT\('prepare'\)"):
        loss.backward()
    head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 1))
    x = batches()[0]
    fastrec.quantize_(head, Int8(), [x])
    head(x).sum().backward()  # what is trained lies behind the INT8 layers: nothing is cut
    assert head[3].weight.grad is not None
    with pytest.raises(ArgumentError, match=r"QAT\('prepare'\)"):  # through bytes, too
        head(x.clone().requires_grad_()).sum().backward()


def test_what_has_no_int8_form_is_named() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.pair = nn.EmbeddingBag(1200, 32), nn.Bilinear(32, 32, 32)
            self.cell, self.layer = nn.GRUCell(32, 32), nn.Linear(32, 32)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.bag(ids)
            return self.layer(self.cell(self.pair(hidden, hidden)))

    report = fastrec.quantize_(Bag().eval(), Int8(), [torch.randint(1200, (4, 6))])
    assert set(report.left) == {"bag", "pair", "cell"}
    assert report.left["bag"] == "EmbeddingBag has no INT8 form"


def test_dropout_that_eval_mode_leaves_on_is_refused() -> None:
    class Noisy(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5))

    class Quiet(Tower):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, self.training))

    for config in (Int8(), QAT("prepare")):
        with pytest.raises(ArgumentError, match=r"dropout that is always on"):
            fastrec.quantize_(Noisy().eval(), config, batches())
        fastrec.quantize_(Quiet().eval(), config, batches())


def test_buffers_that_eval_mode_changes_are_refused() -> None:
    class Counting(Tower):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("cache", torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            if self.kind == "in place":
                self.calls += 1
            elif self.kind == "assigned":
                self.calls = self.calls + 1
            else:
                self.cache = x.new_ones(len(x))
            return super().forward(x)

    for kind in ("in place", "assigned"):
        model = Counting(kind).eval()
        with pytest.raises(ArgumentError, match="leaves as they are, got 'calls' changes"):
            fastrec.quantize_(model, Int8(), batches())
        assert float(model.calls) == 0
        assert type(model.first) is nn.Linear
    assert set(fastrec.quantize_(Counting("cache").eval(), Int8(), batches()).layers) == {
        "first", "second", "last"
    }  # fmt: skip


def test_batches_that_do_not_fit_the_model_say_so() -> None:
    pairs = [(torch.randn(8, 64), torch.randn(8, 64))]
    with pytest.raises(ArgumentError, match=r"batch: expected the inputs of Tower.forward\(x:"):
        fastrec.quantize_(Tower().eval(), Int8(), pairs)


def test_quantised_layers_take_the_float_layers_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.items, self.layer = nn.Embedding(1200, 32), nn.Linear(32, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(input=self.items(input=ids).mean(1))

    ids = torch.randint(1200, (4, 6))
    for config in (Int8(), QAT("prepare")):
        model = Keyword().eval()
        with torch.no_grad():
            expected = model(ids)
        fastrec.quantize_(model, config, [ids])
        assert close(model, expected, ids)


def test_wrappers_of_a_model_are_seen_through() -> None:
    x, model = batches(), Tower().eval()
    with torch.no_grad():
        expected = model(x[0])
    report = fastrec.quantize_(nn.DataParallel(copy.deepcopy(model)), Int8(), x)
    assert set(report.layers) == {"first", "second", "last"}
    compiled = torch.compile(model, backend="eager")
    assert set(fastrec.prune_(compiled, PRUNING).layers) == {
        "first.weight", "second.weight", "last.weight"
    }  # fmt: skip
    assert not torch.equal(model(x[0]), expected)


def transposed(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().t())
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(64, 64),
    "transposed": lambda: transposed(nn.Linear(64, 64)),
    "grouped": lambda: GroupedLinear(64, 64, 2),
    "weight_norm": lambda: parametrise.weight_norm(nn.Linear(64, 64)),
    "orthogonal": lambda: parametrise.orthogonal(nn.Linear(64, 64)),
    "torch's prune": lambda: with_torch_pruning(nn.Linear(64, 64)),
    "expanded": lambda: transposed(nn.Linear(64, 64)),
}


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5),
    sparsity=st.floats(0.1, 0.7),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 9),
)
def test_a_pruning_report_is_what_happened(
    kinds: list[str], sparsity: float, scope: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(*(LAYERS[kind]() for kind in kinds), nn.Linear(64, 64))
    for index, kind in enumerate(kinds):
        if kind == "expanded":
            model[index].weight = nn.Parameter(torch.randn(64, 1).expand(64, 64))
    before = [layer.weight.detach().clone() for layer in model]
    report = fastrec.prune_(model, BlockPruning(sparsity, block=(8, 4), scope=scope))
    for index, old in enumerate(before):
        new = model[index].weight.detach()
        if str(index) in report.left:
            assert torch.equal(new, old)
            continue
        kept = report.layers[f"{index}.weight"].kept
        assert float((new == 0).float().mean()) == pytest.approx(1 - kept, abs=1e-6)
        assert torch.equal(new[new != 0], old[new != 0])
    assert len(report.left) + len(report.layers) == len(model)
    zeros = sum(
        float((model[int(n.split(".")[0])].weight == 0).float().sum()) for n in report.layers
    )
    elements = sum(before[int(n.split(".")[0])].numel() for n in report.layers)
    assert zeros / elements == pytest.approx(report.sparsity, abs=1e-6)
    assert report.sparsity <= sparsity + 1e-6


@settings(max_examples=15, deadline=None)
@given(
    ties=st.lists(st.sampled_from(["call", "matmul", "head", "dtype", "cat", "shape"]), min_size=1,
                  max_size=4, unique=True),
    qat=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_mixture_of_uses_of_a_table_keeps_its_scores(
    ties: list[str], qat: bool, seed: int
) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items, self.layer = nn.Embedding(1200, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 1200, bias=False)
            self.head.weight = self.items.weight

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.layer(self.items(ids)).mean(1)
            scores = hidden.new_zeros(len(ids), 1200)
            table = self.items.weight
            if "matmul" in ties:
                scores = scores + hidden @ table.T
            if "head" in ties:
                scores = scores + self.head(hidden)
            if "dtype" in ties:
                scores = scores.to(table.dtype)
            if "cat" in ties:
                scores = scores + hidden @ torch.cat([table[:600], table[600:]]).T
            if "shape" in ties:
                scores = scores / table.shape[0]
            return scores + self.items(ids).sum((1, 2))[:, None]

    torch.manual_seed(seed)
    model, ids = Mixed().eval(), torch.randint(1200, (8, 10))
    with torch.no_grad():
        expected = model(ids)
    if qat:
        called = ["items", "layer", *(["head"] if "head" in ties else [])]
        fastrec.quantize_(model, QAT("prepare"), filter_fn=called)
        model.train()(ids)
        model.eval()
        fastrec.quantize_(model, QAT("convert"))
    else:
        fastrec.quantize_(model, Int8(), [ids])
    assert close(model, expected, ids)
    outside = {"matmul", "dtype", "cat"} & set(ties)
    assert (type(model.items) is nn.Embedding) == bool(outside)


@pytest.mark.parametrize("value", [1e20, float("nan"), float("inf")])
def test_weights_whose_squares_overflow_are_refused(value: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[3, 5] = value
    with pytest.raises(ArgumentError, match=r"1.weight: expected finite weights below 1e\+16"):
        fastrec.prune_(model, PRUNING)
