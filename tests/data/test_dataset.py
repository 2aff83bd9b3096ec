from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrec.data import SequenceBatch, SequenceDataset, prepare, sampling
from fastrec.data.sampling import NegativeSampler
from fastrec.errors import ArgumentError


def all_of(batches: list[SequenceBatch]) -> dict[str, np.ndarray]:
    names = SequenceBatch.__dataclass_fields__
    return {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in names}


def events_of(dataset: SequenceDataset, user: int) -> slice:
    return slice(int(dataset.offsets[user - 1]), int(dataset.offsets[user]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Users 1 to 6 with as many events each; at most 3 of history."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = [f"{user} {10 * user + i}" for user in range(1, 7) for i in range(user)]
    (folder / "log.txt").write_text("\n".join(lines))
    prepare(folder / "log.txt", folder / "out", max_history=3)
    return SequenceDataset.open(folder / "out")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("width", [None, 1, 7])
def test_batches_are_what_the_events_say(
    demo: SequenceDataset, split: str, width: int | None
) -> None:
    batches = list(demo.batches(split, batch_size=64, n_candidates=9, history_length=width))
    rows = all_of(batches)
    width = width or demo.history_length
    n = demo.num_examples(split)
    assert [len(batch) for batch in batches] == [64] * (n // 64) + [n % 64] * (n % 64 > 0)
    for name, shape in {
        "item": (n, width),
        "category": (n, width),
        "behaviour": (n, width),
        "length": (n,),
        "cand_item": (n, 9),
        "cand_category": (n, 9),
        "label": (n,),
        "user": (n,),
    }.items():
        assert rows[name].shape == shape
        assert rows[name].dtype == np.int64
    assert sorted(rows["user"]) == list(range(1, demo.n_users + 1))
    for row in range(n):
        part = events_of(demo, int(rows["user"][row]))
        items, behaviours = demo.items[part], demo.behaviours[part]
        length = int(rows["length"][row])
        positive = rows["cand_item"][row, rows["label"][row]]
        history = rows["item"][row, :length]
        if split == "train":
            ends = [
                end
                for end in range(1, len(items) - 2)
                if items[end] == positive
                and items[max(0, end - width) : end].tolist() == history.tolist()
                and behaviours[max(0, end - width) : end].tolist()
                == rows["behaviour"][row, :length].tolist()
            ]
            assert ends, "history and target are not neighbours in the train part"
            end = ends[0]
        else:
            end = len(items) - (1 if split == "test" else 2)
            assert items[end] == positive
        assert length == min(end, width)
        assert (history == items[end - length : end]).all()
        assert (rows["behaviour"][row, :length] == behaviours[end - length : end]).all()
        for name in ("item", "category", "behaviour"):
            assert not rows[name][row, length:].any()
    assert (rows["category"] == demo.item_category[rows["item"]]).all()
    assert (rows["cand_category"] == demo.item_category[rows["cand_item"]]).all()
    assert (rows["cand_item"] > 0).all()
    assert (np.diff(np.sort(rows["cand_item"], axis=1), axis=1) > 0).all()  # distinct
    assert len(np.unique(rows["label"])) == 9


def test_test_examples_still_see_a_full_history(demo: SequenceDataset) -> None:
    lengths = {
        split: max(b.length.max() for b in demo.batches(split, batch_size=512))
        for split in ("valid", "test")
    }
    assert lengths == {"valid": demo.history_length, "test": demo.history_length}


def test_inputs_are_in_the_order_of_the_model(demo: SequenceDataset) -> None:
    batch = next(demo.batches("test", batch_size=4))
    names = ("item", "category", "behaviour", "length", "cand_item", "cand_category")
    for value, name in zip(batch.inputs(), names, strict=True):
        assert value is getattr(batch, name)


def test_short_users_have_no_targets(tiny: SequenceDataset) -> None:
    by_user = {int(raw): user for user, raw in enumerate(tiny.user_ids) if user}
    found = {
        split: sorted(
            tiny.user_ids[all_of(list(tiny.batches(split, batch_size=2, n_candidates=1)))["user"]]
        )
        for split in ("train", "valid", "test")
    }
    # 1 event: nothing; 2: both are train; 3: one is train, without a history; 4: two are train.
    assert found == {"train": [2, 4, 5, 6], "valid": [3, 4, 5, 6], "test": [3, 4, 5, 6]}
    for split, users in found.items():
        assert tiny.num_examples(split) == len(users)
    assert len(by_user) == tiny.n_users == 6
    counts = dict(zip(tiny.item_ids.tolist(), tiny.item_count.tolist(), strict=True))
    assert (counts[10], counts[21], counts[30], counts[31], counts[60], counts[64]) == (
        1,
        1,
        1,
        0,
        1,
        0,
    )


def test_same_seed_same_examples_whatever_the_batch_size(demo: SequenceDataset) -> None:
    for split in ("train", "test"):
        kwargs = {"n_candidates": 5, "seed": 3, "targets_per_user": 5 if split == "train" else 1}
        runs = [all_of(list(demo.batches(split, batch_size=b, **kwargs))) for b in (1, 100, 4096)]
        for other in runs[1:]:
            for name, values in runs[0].items():
                assert (values == other[name]).all()
        other = all_of(list(demo.batches(split, batch_size=100, **{**kwargs, "seed": 4})))
        assert (other["cand_item"] != runs[0]["cand_item"]).any()
        short = all_of(list(demo.batches(split, batch_size=7, limit=20, **kwargs)))
        assert (short["cand_item"] == runs[0]["cand_item"][:20]).all()
    assert list(demo.batches("test", batch_size=8, limit=0)) == []


def test_train_draws_other_targets_each_time_and_all_of_them(demo: SequenceDataset) -> None:
    rows = all_of(list(demo.batches("train", batch_size=999, n_candidates=1, targets_per_user=400)))
    assert (rows["label"] == 0).all()
    user = int(rows["user"][0])
    items = demo.items[events_of(demo, user)][:-2]
    drawn = set(rows["cand_item"][rows["user"] == user, 0].tolist())
    assert drawn == set(items[1:].tolist())


def test_shuffle_changes_the_order_only(demo: SequenceDataset) -> None:
    def users(**kwargs: object) -> list[int]:
        return all_of(list(demo.batches("test", batch_size=64, **kwargs)))["user"].tolist()  # type: ignore[arg-type]

    assert users() == sorted(users(shuffle=True)) == list(range(1, demo.n_users + 1))
    assert users(shuffle=True) != users()


def test_popularity_negatives_follow_the_counts(demo: SequenceDataset) -> None:
    sampler = NegativeSampler("popularity", demo.item_count)
    drawn = sampler.draw(np.random.default_rng(0), (200_000,))
    share = np.bincount(drawn, minlength=demo.n_items) / len(drawn)
    wanted = demo.item_count / demo.item_count.sum()
    # Binomial: 6 standard deviations for the largest of some hundred items.
    assert (np.abs(share - wanted) < 6 * np.sqrt(wanted / len(drawn)) + 1e-12).all()
    uniform = NegativeSampler("uniform", demo.item_count)
    drawn = uniform.draw(np.random.default_rng(0), (200_000,))
    assert (drawn.min(), drawn.max()) == (1, demo.n_items - 1)


def test_large_tables_are_searched_in_order_to_the_same_end(
    demo: SequenceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = NegativeSampler("popularity", demo.item_count)
    plain = sampler.draw(np.random.default_rng(1), (50, 7))
    monkeypatch.setattr(sampling, "_SORT_ABOVE", 0)
    assert (sampler.draw(np.random.default_rng(1), (50, 7)) == plain).all()


def test_exclude_seen_leaves_no_item_of_the_user(demo: SequenceDataset) -> None:
    for negatives in ("popularity", "uniform"):
        for batch in demo.batches(
            "test", batch_size=64, n_candidates=30, negatives=negatives, exclude_seen=True
        ):
            for row in range(len(batch)):
                own = demo.items[events_of(demo, int(batch.user[row]))]
                others = np.delete(batch.cand_item[row], batch.label[row])
                assert not np.isin(others, own).any()


@settings(deadline=None)
@given(st.data())
def test_negatives_are_distinct_and_allowed_even_when_they_are_few(data: st.DataObject) -> None:
    counts = np.array(
        [0, *data.draw(st.lists(st.sampled_from([0, 1, 10**9]), min_size=2, max_size=8))]
    )
    kind = data.draw(st.sampled_from(["popularity", "uniform"]))
    drawable = np.flatnonzero(counts) if kind == "popularity" else np.arange(1, len(counts))
    if not len(drawable):
        return
    sampler = NegativeSampler(kind, counts)
    assert sampler.n_drawable == len(drawable)
    positive = np.array([data.draw(st.integers(1, len(counts) - 1))])
    seen = np.array([data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=3))])
    left = sorted(set(drawable) - {positive[0]} - set(seen[0].tolist()))
    for k in range(1, len(counts) + 1):
        rng = np.random.default_rng(k)
        if k > len(left):
            with pytest.raises(ArgumentError, match="n_candidates"):
                sampler.sample(rng, positive, k, seen)
            continue
        (row,) = sampler.sample(rng, positive, k, seen).tolist()
        assert len(set(row)) == k
        assert set(row) <= set(left)


def test_sequences_for_next_item_models(tiny: SequenceDataset) -> None:
    def rows(split: str, width: int) -> dict[tuple[int, ...], tuple[int, ...]]:
        found = {}
        for item, length, target in tiny.sequences(split, batch_size=2, max_length=width):
            assert item.shape == target.shape == (len(length), width)
            assert item.dtype == length.dtype == target.dtype == np.int64
            for row in range(len(length)):
                assert not item[row, length[row] :].any()
                assert not target[row, length[row] :].any()
                key = tuple(tiny.item_ids[item[row, : length[row]]].tolist())
                found[key] = tuple(tiny.item_ids[target[row, : length[row]]].tolist())
        return found

    # Five events of the last user are stored: 3 of history and two targets.
    assert rows("train", 4) == {
        (20,): (21,),
        (40,): (41,),
        (50, 51): (51, 52),
        (61, 62): (62, 63),
    }
    assert rows("train", 1)[(62,)] == (63,)
    assert rows("valid", 4) == {
        (30,): (31,),
        (40, 41): (0, 42),
        (50, 51, 52): (0, 0, 53),
        (61, 62, 63): (0, 0, 64),
    }
    assert rows("test", 2) == {
        (30, 31): (0, 32),
        (41, 42): (0, 43),
        (52, 53): (0, 54),
        (63, 64): (0, 65),
    }


def test_sequences_shuffle_by_seed(demo: SequenceDataset) -> None:
    def first(**kwargs: int) -> np.ndarray:
        return next(demo.sequences("train", batch_size=64, max_length=8, **kwargs))[0]

    assert (first(seed=1) == first(seed=1)).all()
    assert (first(seed=1) != first(seed=2)).any()


def test_no_target_is_ever_in_a_train_example(tiny: SequenceDataset) -> None:
    targets = {31, 32, 42, 43, 53, 54, 64, 65}
    for seed in range(5):
        for batch in tiny.batches("train", batch_size=8, n_candidates=1, seed=seed):
            used = set(tiny.item_ids[np.concatenate([batch.item.ravel(), batch.cand_item.ravel()])])
            assert not used & targets
    for item, _, target in tiny.sequences("train", batch_size=8, max_length=9):
        assert not set(tiny.item_ids[np.concatenate([item.ravel(), target.ravel()])]) & targets


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"n_candidates": 0},
        {"n_candidates": 10**6},
        {"negatives": "hard"},
        {"history_length": 0},
        {"history_length": 21},
        {"seed": -1},
        {"limit": -1},
        {"targets_per_user": 0},
        {"targets_per_user": 2},
    ],
)
def test_bad_arguments_are_named_at_the_call(demo: SequenceDataset, wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(ArgumentError, match=name):
        demo.batches("test", **{"batch_size": 4, **wrong})  # type: ignore[arg-type]


def test_bad_split_and_widths(demo: SequenceDataset) -> None:
    for call in (
        lambda: demo.num_examples("dev"),
        lambda: demo.batches("dev", batch_size=1),
        lambda: demo.sequences("dev", batch_size=1, max_length=1),
    ):
        with pytest.raises(ArgumentError, match="split"):
            call()
    with pytest.raises(ArgumentError, match="max_length"):
        demo.sequences("train", batch_size=1, max_length=0)


def test_users_are_stored_in_the_order_of_their_hash(demo: SequenceDataset) -> None:
    from fastrec.data.preparation import mix64

    hashes = mix64(demo.user_ids[1:].view(np.uint64)).tolist()
    assert all(a < b for a, b in pairwise(hashes))


def test_arrays_are_mapped_read_only(demo: SequenceDataset) -> None:
    assert isinstance(demo.path, Path)
    with pytest.raises(ValueError, match="read-only"):
        demo.items[0] = 1
