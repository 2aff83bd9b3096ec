"""AttentionPattern: its rule, checked key by key, and the arguments it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrec import AttentionPattern
from fastrec.errors import ArgumentError


@given(
    window=st.integers(0, 20),
    offsets=st.sampled_from(["none", "log2", "strided:3", "strided:40"])
    | st.lists(st.integers(1, 70), max_size=5),
    causal=st.booleans(),
    length=st.integers(0, 70),
)
def test_mask_is_the_rule(window: int, offsets: Any, causal: bool, length: int) -> None:
    far = (
        {
            "none": set(),
            "log2": {2**n for n in range(7)},
            "strided:3": set(range(3, 80, 3)),
            "strided:40": {40},
        }[offsets]
        if isinstance(offsets, str)
        else set(offsets)
    )
    pattern = AttentionPattern(window, offsets, causal)
    mask = pattern.mask(length)
    assert mask.shape == (1, length, length)
    for i in range(length):
        for j in range(length):
            seen = (abs(i - j) <= window or abs(i - j) in far) and (not causal or j <= i)
            assert mask[0, i, j] == seen
    assert all(window < d < length for d in pattern.distances(length))


def test_offsets_of_each_head() -> None:
    pattern = AttentionPattern(1, [[5, 3, 5], []])
    assert pattern.heads == 2
    assert pattern.per_head
    assert pattern.distances(10, 0) == (3, 5)
    assert pattern.distances(10, 1) == ()
    mask = pattern.mask(10)
    assert mask.shape == (2, 10, 10)
    assert mask[0, 0, 5]
    assert not mask[1, 0, 5]


def test_random_offsets_are_distinct_far_and_the_same_for_a_seed() -> None:
    pattern = AttentionPattern(4, "random", num_random=6, max_length=64, seed=3)
    heads = [pattern.distances(64, head) for head in range(8)]
    assert len(set(heads)) == 8
    for distances in heads:
        assert len(set(distances)) == 6
        assert all(4 < d < 64 for d in distances)
    assert heads == [
        AttentionPattern(4, "random", num_random=6, max_length=64, seed=3).distances(64, head)
        for head in range(8)
    ]
    # A shorter sequence keeps those that fit.
    assert pattern.distances(20, 0) == tuple(d for d in heads[0] if d < 20)
    assert torch.equal(pattern.mask(64, heads=8)[5], pattern.mask(64, heads=6)[5])


def test_equal_patterns_are_equal_and_hashable() -> None:
    assert AttentionPattern(2, [3, 9, 3]) == AttentionPattern(2, (9, 3))
    assert len({AttentionPattern(2, [3]), AttentionPattern(2, (3,)), AttentionPattern(2)}) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"window": -1}, "window"),
        ({"window": 1.5}, "window"),
        ({"window": 1, "offsets": "log3"}, "offsets"),
        ({"window": 1, "offsets": "strided:0"}, "offsets"),
        ({"window": 1, "offsets": "strided:x"}, "offsets"),
        ({"window": 1, "offsets": [0]}, "offsets"),
        ({"window": 1, "offsets": [[1], [-2]]}, "offsets"),
        ({"window": 1, "offsets": 5}, "offsets"),
        ({"window": 1, "offsets": "random"}, "num_random"),
        ({"window": 1, "offsets": "random", "num_random": 2}, "max_length"),
        ({"window": 4, "offsets": "random", "num_random": 4, "max_length": 8}, "num_random"),
        ({"window": 1, "max_length": 8}, "max_length"),
        ({"window": 1, "num_random": 8}, "num_random"),
    ],
)
def test_bad_patterns_say_what_is_wrong(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^{named}: expected"):
        AttentionPattern(**arguments)
