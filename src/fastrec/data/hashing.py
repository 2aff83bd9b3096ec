"""64-bit hashes that depend on nothing but the value: of integers, and of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_WORDS = 8
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_INV1, _INV2 = pow(_MUL1, -1, 1 << 64), pow(_MUL2, -1, 1 << 64)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection of 64-bit words (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MUL1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MUL2)
    return values ^ (values >> np.uint64(31))


def unmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Inverse of :func:`mix64`."""

    def unshift(words: NDArray[np.uint64], by: int) -> NDArray[np.uint64]:
        return words ^ (words >> np.uint64(by)) ^ (words >> np.uint64(2 * by))

    values = unshift(values, 31) * np.uint64(_INV2)
    values = unshift(values, 27) * np.uint64(_INV1)
    return unshift(values, 30)


def text_keys(texts: Sequence[str]) -> NDArray[np.int64]:
    """int64 [n]: a hash of each text's UTF-8: its length and words of 8 bytes through
    :func:`mix64` one after another; of a text of more than 64 bytes the start of its BLAKE2b."""
    encoded = [text.encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], np.int64)
    keys = mix64(lengths.astype(np.uint64))
    padded = np.array(encoded, f"S{_WORDS * 8}") if encoded else np.zeros(0, f"S{_WORDS * 8}")
    words = padded.view("<u8").reshape(len(encoded), _WORDS)
    for word in range(_WORDS):
        rows = np.flatnonzero(lengths > 8 * word)
        if not len(rows):
            break
        keys[rows] = mix64(keys[rows] ^ words[rows, word])
    for row in np.flatnonzero(lengths > 8 * _WORDS).tolist():
        keys[row] = int.from_bytes(hashlib.blake2b(encoded[row], digest_size=8).digest(), "little")
    return keys.view(np.int64)
