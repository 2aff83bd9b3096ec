"""Training: it learns, repeats, resumes bit for bit, stops early, and refuses damaged files."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from fastrec.errors import ArgumentError, ArtifactError, IdRangeError
from fastrec.models import Ranker, RankerConfig, SASRec, SASRecConfig
from fastrec.train import (
    DivergedError,
    TrainConfig,
    autocast_dtype,
    evaluate,
    fit,
    load_model,
    save_model,
)

QUICK = TrainConfig(epochs=4, batch_size=16, n_candidates=8, amp=False, valid_users=32)


def build(config: RankerConfig, dropout: float = 0.0) -> Ranker:
    torch.manual_seed(0)
    return Ranker(RankerConfig.from_dict({**config.to_dict(), "dropout": dropout}))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_it_learns(dataset, tiny) -> None:  # type: ignore[no-untyped-def]
    model = build(tiny)
    before = evaluate(model, dataset, ks=(5,)).metrics["hit_rate_5"]
    popular = torch.from_numpy(dataset.item_count)
    by_popularity = evaluate(lambda *i: popular[i[4]].float(), dataset, ks=(5,))
    report = fit(
        model,
        dataset,
        TrainConfig(epochs=40, batch_size=16, n_candidates=8, lr=3e-3, patience=None, seed=1),
        progress=False,
    )
    after = evaluate(model, dataset, ks=(5,)).metrics["hit_rate_5"]
    assert report.stopped == "finished"
    assert report.steps == 40 * 6
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert after > max(before, by_popularity.metrics["hit_rate_5"]) + 0.3


def test_sasrec_learns(dataset) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(dataset.n_items, max_length=12, d=16, ffn=32, dropout=0.1))
    report = fit(
        model, dataset, TrainConfig(epochs=30, batch_size=16, lr=5e-3, amp=False), progress=False
    )
    assert report.history[-1]["loss"] < 0.8 * report.history[0]["loss"]
    assert report.best_metric is not None


def test_same_seed_same_weights_and_the_caller_s_random_state_is_kept(dataset, tiny) -> None:  # type: ignore[no-untyped-def]
    first, second, other = (build(tiny, 0.1) for _ in range(3))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fit(first, dataset, QUICK, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    fit(second, dataset, QUICK, progress=False)
    fit(other, dataset, TrainConfig.from_dict({**QUICK.to_dict(), "seed": 1}), progress=False)
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.parametrize("stop", [6, 9, 12])
def test_resume_is_bit_exact(dataset, tiny, tmp_path: Path, stop: int) -> None:  # type: ignore[no-untyped-def]
    """6 and 12 fall on an epoch's end, 9 in the middle of one; dropout needs the random state."""
    straight, resumed = build(tiny, 0.1), build(tiny, 0.1)
    whole = fit(straight, dataset, QUICK, progress=False)
    part = fit(
        resumed, dataset, QUICK, out=tmp_path, progress=False, on_step=lambda step, _: step == stop
    )
    assert (part.stopped, part.steps) == ("on_step", stop)
    fresh = build(tiny, 0.1)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(0.5)
    rest = fit(fresh, dataset, QUICK, out=tmp_path, resume=True, progress=False)
    assert same(straight, fresh)
    assert rest.steps == whole.steps
    assert rest.history == whole.history
    assert same(load_model(tmp_path), straight)
    again = fit(fresh, dataset, QUICK, out=tmp_path, resume=True, progress=False)
    assert again.steps == whole.steps
    assert same(straight, fresh)


def test_crash_between_checkpoints_loses_nothing_but_time(dataset, tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = TrainConfig.from_dict({**QUICK.to_dict(), "checkpoint_steps": 5})

    def crash(step: int, loss: float) -> bool:
        if step == 14:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        fit(build(tiny), dataset, config, out=tmp_path, progress=False, on_step=crash)
    straight, resumed = build(tiny), build(tiny)
    fit(straight, dataset, config, progress=False)
    fit(resumed, dataset, config, out=tmp_path, resume=True, progress=False)
    assert same(straight, resumed)
    assert not list(tmp_path.glob(".*"))


def test_early_stopping_keeps_the_best_weights(dataset, tiny) -> None:  # type: ignore[no-untyped-def]
    values = iter([0.1, 0.5, 0.3, 0.4, 0.2, 0.9])
    kept = {}

    def validate(model: torch.nn.Module) -> dict[str, float]:
        value = next(values)
        kept[value] = {k: v.clone() for k, v in model.state_dict().items()}
        return {"score": value}

    model = build(tiny)
    config = TrainConfig.from_dict(
        {**QUICK.to_dict(), "epochs": 10, "patience": 2, "metric": "score"}
    )
    report = fit(model, dataset, config, progress=False, validate=validate)
    assert (report.stopped, report.epochs, report.best_epoch) == ("patience", 4, 1)
    assert report.best_metric == 0.5
    assert all(torch.equal(v, kept[0.5][k]) for k, v in model.state_dict().items())


def test_max_steps_and_pluggable_loss_and_batches(dataset, tiny) -> None:  # type: ignore[no-untyped-def]
    seen = []

    def loss_fn(model: torch.nn.Module, batch: int) -> torch.Tensor:
        seen.append(batch)
        return model.weight.square().sum()

    model = torch.nn.Linear(3, 2)
    report = fit(
        model,
        dataset,
        TrainConfig(max_steps=7, batch_size=16, epochs=5, valid_users=0, amp=False),
        progress=False,
        loss_fn=loss_fn,
        batches=lambda epoch: range(epoch * 10, epoch * 10 + 6),
    )
    assert (report.steps, report.stopped, report.best_epoch) == (7, "max_steps", None)
    assert seen == [0, 1, 2, 3, 4, 5, 10]


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(lr=1.0, warmup=0.1, final_lr=0.1)
    rates = [config.lr_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_mixed_precision_trains_where_the_device_has_it(dataset, tiny) -> None:  # type: ignore[no-untyped-def]
    report = fit(
        build(tiny),
        dataset,
        TrainConfig(epochs=1, batch_size=16, n_candidates=8),
        progress=False,
    )
    expected = autocast_dtype(torch.device("cpu"))
    assert report.amp == (None if expected is None else "bfloat16")


def test_progress_bar_goes_to_standard_error(dataset, tiny, capsys) -> None:  # type: ignore[no-untyped-def]
    fit(build(tiny), dataset, TrainConfig.from_dict({**QUICK.to_dict(), "epochs": 1}))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "training" in shown.err


def test_bad_ids_are_named_before_they_reach_the_tables(dataset, tiny) -> None:  # type: ignore[no-untyped-def]
    small = RankerConfig.from_dict({**tiny.to_dict(), "n_items": 10})
    with pytest.raises(IdRangeError, match="item"):
        fit(build(small), dataset, QUICK, progress=False)


def test_divergence_is_an_error_not_a_nan_model(dataset, tiny) -> None:  # type: ignore[no-untyped-def]
    model = build(tiny)
    with torch.no_grad():
        model.tower[0].weight.fill_(torch.nan)
    with pytest.raises(DivergedError, match="step 0"):
        fit(model, dataset, QUICK, progress=False)


def test_resume_needs_a_checkpoint_and_the_same_settings(dataset, tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match="out"):
        fit(build(tiny), dataset, QUICK, resume=True)
    with pytest.raises(ArtifactError, match="no such file"):
        fit(build(tiny), dataset, QUICK, out=tmp_path, resume=True, progress=False)
    short = TrainConfig.from_dict({**QUICK.to_dict(), "epochs": 1})
    fit(build(tiny), dataset, short, out=tmp_path, progress=False)
    other = TrainConfig.from_dict({**short.to_dict(), "lr": 0.5})
    with pytest.raises(ArgumentError, match="lr"):
        fit(build(tiny), dataset, other, out=tmp_path, resume=True, progress=False)
    wider = RankerConfig.from_dict({**tiny.to_dict(), "d": 32})
    with pytest.raises(ArtifactError, match="does not fit"):
        fit(build(wider), dataset, short, out=tmp_path, resume=True, progress=False)
    longer = fit(build(tiny), dataset, QUICK, out=tmp_path, resume=True, progress=False)
    assert longer.epochs == QUICK.epochs


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors"])
def test_damaged_files_are_refused(dataset, tiny, tmp_path: Path, damage: str, name: str) -> None:  # type: ignore[no-untyped-def]
    config = TrainConfig.from_dict({**QUICK.to_dict(), "epochs": 1})
    fit(build(tiny), dataset, config, out=tmp_path, progress=False)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-100] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_text(json.dumps({"not": "safetensors"}))
    resume = name == "checkpoint.safetensors"
    read = partial(fit, build(tiny), dataset, config, out=tmp_path, resume=True, progress=False)
    with pytest.raises(ArtifactError, match=name):
        read() if resume else load_model(tmp_path)


def test_saved_models_come_back_whole(tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for model in (build(tiny), SASRec(SASRecConfig(20, max_length=5, d=8, ffn=16))):
        save_model(tmp_path / "m.safetensors", model)
        back = load_model(tmp_path / "m.safetensors")
        assert type(back) is type(model)
        assert back.config == model.config
        assert same(model, back)
    linear = torch.nn.Linear(2, 2)
    save_model(tmp_path / "own.safetensors", linear)
    with pytest.raises(ArtifactError, match="pass one"):
        load_model(tmp_path / "own.safetensors")
    assert same(load_model(tmp_path / "own.safetensors", torch.nn.Linear(2, 2)), linear)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("lr", float("nan")),
        ("lr", 0.0),
        ("weight_decay", -0.1),
        ("warmup", 1.5),
        ("n_candidates", 1),
        ("negatives", "hard"),
        ("clip", 0.0),
        ("max_steps", 0),
        ("valid_users", -1),
    ],
)
def test_bad_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ArgumentError) as caught:
        TrainConfig(**{name: value})  # type: ignore[arg-type]
    assert caught.value.argument == name
