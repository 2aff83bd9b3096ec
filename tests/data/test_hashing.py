from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastrec.data.hashing import mix64, text_keys, unmix64


def test_hash_of_integers_is_a_bijection() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    values[:3] = 0, 1, 2**64 - 1
    assert (unmix64(mix64(values)) == values).all()


@given(st.lists(st.text(max_size=80), max_size=8))
def test_keys_of_texts_depend_on_the_text_alone(texts: list[str]) -> None:
    keys = text_keys(texts)
    assert keys.dtype == np.int64
    assert keys.tolist() == [int(text_keys([text])[0]) for text in texts]
    assert len(set(keys.tolist())) == len(set(texts))


def test_keys_tell_texts_apart() -> None:
    texts = [f"{i}" for i in range(50_000)] + [f"item-{i:070d}" for i in range(1_000)]
    texts += ["\x00" * n for n in range(80)] + ["a" * n for n in range(1, 80)]
    assert len(set(text_keys(texts).tolist())) == len(texts)
    # Fixed, so that a folder made today is read tomorrow.
    assert text_keys(["B00012345"]).tolist() == [4215019072512883932]
