"""The experiments on a data set small enough for a test: protocol, loss, variants, report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from experiments.histories import Histories
from experiments.product_table import ProductTable
from experiments.ranking import kept, rank, shown
from experiments.sasrec import mean_loss, sequence_loss
from experiments.softmax import catalogue_loss
from experiments.variants import VARIANTS, read, run
from typer.testing import CliRunner

from fastrec.errors import ArgumentError
from fastrec.models import SASRec, SASRecConfig
from fastrec.train import Evaluation

USERS, ITEMS = 60, 1100


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each user walks up the catalogue from somewhere: the next item is learnable."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(1, USERS + 1):
        length, item = rng.integers(3, 30), rng.integers(1, ITEMS - 120)
        lines += [f"{user} {item + 3 * i}" for i in range(length)]
    path = tmp_path_factory.mktemp("data") / "small.txt"
    path.write_text("\n".join([*lines, f"{USERS + 1} {ITEMS - 1}"]) + "\n")
    return path


def test_leave_one_out(file: Path) -> None:
    data = Histories.read(file)
    assert len(data.users()) == USERS  # the user of one item has no targets
    known, _ = data.history(0, "test")
    validated, before = data.history(0, "valid")
    assert list(known[:-1]) == list(validated)
    assert known[-1] == before
    for batch in data.training(8, seed=1):
        # What is trained on ends before the validation target.
        rows = zip(batch.user, batch.item, batch.target, batch.length, strict=True)
        for user, item, wanted, n in rows:
            own, held_out = data.history(int(user), "valid")
            assert set(wanted[:n]) <= set(own)
            assert held_out not in wanted[:n]
            np.testing.assert_array_equal(item[1:n], wanted[: max(n - 1, 0)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1 2\n2 1\n1 3\n", "together"), ("1 x\n", "two integers"), ("1 2 3\n", "two integers")],
)
def test_a_file_that_is_not_histories_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=expected):
        Histories.read(path)
    with pytest.raises(ArgumentError, match="a file of"):
        Histories.read(tmp_path / "none.txt")


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("rows", [1, 127, 300])
def test_the_loss_in_pieces_is_the_plain_one(rows: int, share: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 16, requires_grad=True)
    table = torch.randn(37, 16, requires_grad=True)
    target = torch.randint(1, 37, (rows,))
    guide = torch.randn(rows, 8), torch.randn(37, 8)
    loss = catalogue_loss(hidden, table, target, guide=guide if share else None, share=share)
    ours = torch.autograd.grad(loss, (hidden, table))
    scores = (hidden @ table.t())[:, 1:].log_softmax(1)
    wanted = (1 - share) * F.one_hot(target - 1, 36)
    wanted = wanted + share * (guide[0] @ guide[1].t())[:, 1:].softmax(1)
    plain = -(wanted * scores).sum()
    # Sums of rows x 36 products of float32, in another order.
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-4)
    for a, b in zip(ours, torch.autograd.grad(plain, (hidden, table)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_loss_in_bfloat16_points_the_same_way() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(200, 16, requires_grad=True)
    table = torch.randn(37, 16, requires_grad=True)
    target = torch.randint(1, 37, (200,))
    losses = [
        catalogue_loss(hidden, table, target, dtype=t) for t in (torch.float32, torch.bfloat16)
    ]
    # Scores and probabilities have 8 bits: 2^-8 of each, and sums of 200 rows.
    torch.testing.assert_close(losses[1], losses[0], rtol=2**-7, atol=0.0)
    exact, rounded = (torch.autograd.grad(loss, (hidden, table)) for loss in losses)
    for a, b in zip(rounded, exact, strict=True):
        assert (a - b).norm() < 2**-6 * b.norm()


def test_each_target_weighs_about_the_same(file: Path) -> None:
    data = Histories.read(file)
    batches = list(data.training(6, seed=0))
    assert len(batches) == USERS / 6
    users = np.concatenate([batch.user for batch in batches])
    assert sorted(users) == sorted(data.users())
    targets = np.array([(batch.target > 0).sum() for batch in batches])
    # A batch is off by a user at either end.
    assert np.abs(targets - targets.mean()).max() <= 2 * data.lengths.max()
    assert len({len(batch.user) for batch in batches}) > 1


def test_a_product_table_is_near_what_it_stands_for() -> None:
    torch.manual_seed(0)
    table = torch.randn(600, 16)
    table[0] = 0
    errors = []
    for parts in (2, 8):
        product = ProductTable.of(table, parts)
        ids = torch.arange(600).view(20, 30)
        rows = product(ids)
        assert rows.shape == (20, 30, 16)
        assert not rows[0, 0].any()
        errors.append(float((rows.detach().flatten(0, 1) - table).square().mean()))
    # Of a variance of 1, a byte for 8 numbers leaves a good part, a byte for 2 little.
    assert 0.5 > errors[0] > 0.05 > 5 * errors[1]
    rows.sum().backward()
    assert product.codewords.grad is not None
    again = ProductTable(torch.zeros_like(product.codes), torch.zeros_like(product.codewords))
    again.load_state_dict(product.state_dict())
    torch.testing.assert_close(again(ids), rows, rtol=0, atol=0)
    for parts, codewords in ((3, 8), (4, 257), (4, 1)):
        with pytest.raises(ArgumentError):
            ProductTable.of(table, parts, codewords)


def test_threads_share_a_batch_without_changing_it(file: Path) -> None:
    data = Histories.read(file)
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(data.n_items, d=16, ffn=32, dropout=0.0)).train()
    batch = next(iter(data.training(16, 0)))
    grads = []
    for workers in (1, 2):
        loss = mean_loss(sequence_loss(), workers)(model, batch)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_seen_items_are_left_out_and_the_target_is_not(file: Path) -> None:
    data = Histories.read(file)
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(data.n_items, d=16, ffn=32)).eval()
    with_seen = rank(model, data, "test", exclude_seen=False, intervals=False)
    without = rank(model, data, "test", intervals=False)
    assert (without.ranks <= with_seen.ranks).all()
    seen = np.array([len(set(data.history(int(u), "test")[0])) for u in without.users])
    assert (with_seen.ranks - without.ranks <= seen).all()


def test_what_there_was_nothing_of_is_shown_so() -> None:
    ranks = np.arange(200) % 50
    base = Evaluation.from_ranks(ranks, protocol="full", n_candidates=100)
    assert kept(base, base, "mrr") == {"share": 1.0, "low": 1.0, "high": 1.0}
    nothing = Evaluation.from_ranks(ranks + 50, protocol="full", n_candidates=100)
    assert shown(kept(base, nothing, "hit_rate_50")) == "-"
    assert shown(kept(nothing, base, "hit_rate_50"), 1) == "0.0 [0.0, 0.0]"


@pytest.mark.slow
def test_variants_end_to_end_and_resumed(file: Path, tmp_path: Path) -> None:
    from experiments.report import app as report
    from experiments.sasrec import app as train

    arguments = ["--data", str(file), "--out", str(tmp_path / "base"), "--d", "32"]
    done = CliRunner().invoke(
        train, ["train", *arguments, "--epochs", "2", "--lr", "0.01", "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    data = Histories.read(file)
    from fastrec.train import load_model

    base = load_model(tmp_path / "base" / "model.safetensors")
    assert isinstance(base, SASRec)
    settings = {"workers": 1, "seed": 1}
    said: list[str] = []
    student = "distilled, a fifth of the parameters"
    names = ("baseline", "window 32 + log2", "75 % pruned + int8", student)
    some = tuple(
        dataclasses.replace(v, epochs=min(v.epochs, 1)) for v in VARIANTS if v.name in names
    )
    out = tmp_path / "variants"
    run(data, base, out, **settings, variants=some[:2], say=said.append)
    assert len(said) == 2
    run(data, base, out, **settings, variants=some, say=said.append)
    assert len(said) == len(some)  # what was done is not done again
    found = read(out, data)
    assert list(found) == [v.name for v in some]
    full, pruned = (found[name][2]["bytes"] for name in ("baseline", "75 % pruned + int8"))
    assert pruned < 0.25 * full
    done = CliRunner().invoke(
        report,
        ["--data", str(file), "--base", str(tmp_path / "base"), "--runs", str(out),
         "--out", str(tmp_path / "results")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "results" / "sasrec.json").read_text())
    assert len(results["variants"]) == len(some)
    assert (tmp_path / "results" / "sasrec.png").stat().st_size > 10_000
    text = (tmp_path / "results" / "sasrec.md").read_text()
    assert "Not measured yet: int8, not fine-tuned;" in text


def test_a_variant_that_does_not_exist_is_refused(file: Path, tmp_path: Path) -> None:
    from experiments.variants import app

    folders = ["--base", str(tmp_path), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["--data", str(file), *folders, "--only", "90 % pruned"])
    assert done.exit_code == 2
    assert "there are" in done.output
