"""Inputs are checked before anything is computed; whatever the spec accepts, the model can run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrec.errors import ArgumentError, DtypeError, IdRangeError, ShapeError
from fastrec.exporters.model_spec import spec_of
from fastrec.models import SASRec, SASRecConfig, validate_inputs
from fastrec.spec import InputField, InputSpec


def _set(index: int, change):
    return lambda request: (*request[:index], change(request[index]), *request[index + 1 :])


def _with(array: np.ndarray, where, value: int) -> np.ndarray:
    changed = array.copy()
    changed[where] = value
    return changed


BAD = {
    "too few inputs": (lambda r: r[:5], ArgumentError, "inputs"),
    "int32": (_set(0, lambda a: a.astype(np.int32)), DtypeError, "item"),
    "float": (_set(3, lambda a: a.astype(np.float64)), DtypeError, "length"),
    "a list": (_set(1, lambda a: a.tolist()), DtypeError, "category"),
    "mixed kinds": (_set(2, torch.from_numpy), DtypeError, "behaviour"),
    "rank": (_set(3, lambda a: a[:, None]), ShapeError, "length"),
    "no row": (lambda r: tuple(a[:0] for a in r), ShapeError, "item"),
    "other batch": (_set(4, lambda a: a[:1]), ShapeError, "cand_item"),
    "other history": (_set(1, lambda a: a[:, :-1]), ShapeError, "category"),
    "other candidates": (_set(5, lambda a: a[:, :-1]), ShapeError, "cand_category"),
    "no candidate": (lambda r: (*r[:4], r[4][:, :0], r[5][:, :0]), ShapeError, "cand_item"),
    "long history": (
        lambda r: (*[np.repeat(a, 2, axis=1) for a in r[:3]], *r[3:]),
        ShapeError,
        "item",
    ),
    "item too large": (_set(0, lambda a: _with(a, (1, 2), 300)), IdRangeError, "item"),
    "negative item": (_set(0, lambda a: _with(a, (1, 2), -1)), IdRangeError, "item"),
    "category": (_set(1, lambda a: _with(a, (0, 0), 30)), IdRangeError, "category"),
    "behaviour": (_set(2, lambda a: _with(a, (0, 0), 5)), IdRangeError, "behaviour"),
    "length": (_set(3, lambda a: _with(a, 0, 13)), IdRangeError, "length"),
    "candidate": (_set(4, lambda a: _with(a, (2, 3), 2**62)), IdRangeError, "cand_item"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("seen", [False, True], ids=["new shapes", "known shapes"])
def test_bad_requests_are_named(ranker, request_of, case, seen):
    change, error, argument = BAD[case]
    spec = spec_of(ranker, ())
    request = request_of(3)
    if seen:
        spec.check(request)
    with pytest.raises(error) as caught:
        spec.check(change(request))
    assert caught.value.argument == argument
    spec.check(request)


def test_the_ends_of_every_range_are_accepted(ranker, request_of):
    config = ranker.config
    item, category, behaviour, length, cand_item, cand_category = request_of(2)
    item[0, 0], item[1, 0] = 0, config.n_items - 1
    category[0, 0], behaviour[0, 0] = config.n_categories - 1, config.n_behaviours
    length[:] = 0, item.shape[1]
    request = (item, category, behaviour, length, cand_item, cand_category)
    arrays, from_torch = spec_of(ranker, ()).check(request)
    assert not from_torch
    assert all(a is b for a, b in zip(arrays, request, strict=True))


@given(
    batch=st.integers(1, 5),
    history=st.integers(1, 12),
    candidates=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_the_spec_accepts_what_the_models_own_check_accepts(
    ranker, batch, history, candidates, seed
):
    spec = spec_of(ranker, ())
    request = spec.sample({"B": batch, "L": history, "m": candidates}, seed=seed)
    spec.check(request)
    validate_inputs(ranker.config, *map(torch.from_numpy, request))


def test_large_batches_are_checked_too(ranker):
    spec = spec_of(ranker, ())
    request = spec.sample({"B": 4000, "m": 2})
    spec.check(request)
    request[0][3999, 11] = 300
    with pytest.raises(IdRangeError, match=r"item: expected ids in 0\.\.299, got 300"):
        spec.check(request)


def test_a_spec_survives_json_and_fixing(ranker, request_of):
    spec = spec_of(ranker, ())
    assert InputSpec.from_dict(spec.to_dict()) == spec
    request = request_of(2)
    fixed = spec.fixed_to([a.shape for a in request], keep=("B",))
    fixed.check(request_of(5))
    with pytest.raises(ShapeError, match=r"item: expected shape \[B, 12\], got shape \[2, 6\]"):
        fixed.check(request_of(2, length=6))
    fixed.check(request)
    assert [f.rows for f in fixed.fields if f.name == "length"] == [13]
    assert InputSpec.from_dict(fixed.to_dict()) == fixed


def test_other_models_get_their_examples_ranks_and_dtypes():
    class Two(torch.nn.Module):
        def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return dense.sum(-1) + ids.sum(-1)

    spec = spec_of(Two(), (torch.zeros(2, 7), torch.zeros(2, 3, dtype=torch.int64)))
    assert spec.names == ("dense", "ids")
    good = (np.zeros((5, 7), np.float32), np.zeros((5, 3), np.int64))
    spec.check(good)
    with pytest.raises(DtypeError, match="dense: expected float32, got float64"):
        spec.check((good[0].astype(np.float64), good[1]))
    with pytest.raises(ShapeError, match="ids"):
        spec.check((good[0], good[1][:, :2]))


def test_sasrec_has_its_own_spec():
    spec = spec_of(SASRec(SASRecConfig(n_items=50, max_length=8, d=8, ffn=8)), ())
    item, length = spec.sample({"B": 2})
    spec.check((item, length))
    with pytest.raises(IdRangeError, match=r"length: expected lengths in 0\.\.8, got 9"):
        spec.check((item, np.array([1, 9])))


def test_fields_are_plain_data(ranker):
    assert dataclasses.asdict(spec_of(ranker, ()).fields[3]) == {
        "name": "length",
        "dims": ("B",),
        "dtype": "int64",
        "rows": "L",
    }


def test_a_sample_is_one_request_of_the_longest_history(ranker):
    item, _, _, length, cand_item, _ = spec_of(ranker, ()).sample()
    assert item.shape == (1, 12)
    assert length.shape == (1,)
    assert cand_item.shape == (1, 50)


@pytest.mark.parametrize(
    ("limits", "sizes", "expected"),
    [
        ({}, None, (1, 50)),
        ({"B": (1, None)}, None, (1, 50)),
        ({"B": (1, 256), "L": (1, 20)}, None, (1, 20)),
        ({"B": (4, None), "L": (60, None)}, None, (4, 60)),
        ({"B": (1, 256), "L": (1, 20)}, {"B": 3, "L": 2}, (3, 2)),
    ],
)
def test_the_sizes_of_a_sample(limits, sizes, expected):
    spec = InputSpec((InputField("ids", ("B", "L"), rows=9),), limits)
    (ids,) = spec.sample(sizes)
    assert ids.shape == expected
    spec.check((ids,))


class TwoInputs(torch.nn.Module):
    def forward(self, item: torch.Tensor, cand: torch.Tensor) -> torch.Tensor:
        return item.sum(1, keepdim=True).float() + cand


EXAMPLES = (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))


def test_sizes_of_a_model_of_the_users_own_are_fixed_unless_named() -> None:
    fixed = spec_of(TwoInputs(), EXAMPLES)
    assert [f.dims for f in fixed.fields] == [("B", 5), ("B", 3)]
    free = spec_of(TwoInputs(), EXAMPLES, {"item": ("B", "L")}, {"L": 9})
    assert [f.dims for f in free.fields] == [("B", "L"), ("B", 3)]
    assert free.limits == {"B": (1, None), "L": (1, 9)}


@pytest.mark.parametrize(
    ("dims", "limits", "error", "match"),
    [
        ({"items": ("B", "L")}, None, ArgumentError, "names of inputs.*items"),
        ({"item": ("B",)}, None, ShapeError, r"dims\['item'\]"),
        ({"item": ("L", "B")}, None, ShapeError, r"dims\['item'\]"),
        ({"item": ("B", 4)}, None, ShapeError, r"\[2, 5\]"),
        ({"item": ("B", "L"), "cand": ("B", "L")}, None, ShapeError, r"dims\['cand'\]"),
        ({"item": ("B", "L")}, {"L": 4}, ArgumentError, "limits"),
        ({"item": ("B", "L")}, {"m": 9}, ArgumentError, "limits"),
    ],
)
def test_names_of_sizes_that_do_not_fit_the_examples(dims, limits, error, match) -> None:
    with pytest.raises(error, match=match):
        spec_of(TwoInputs(), EXAMPLES, dims, limits)


def test_models_of_fastrec_say_their_sizes_themselves() -> None:
    model = SASRec(SASRecConfig(n_items=10, max_length=8, d=8))
    with pytest.raises(ArgumentError, match="dims"):
        spec_of(model, (), {"item": ("B", "L")})
