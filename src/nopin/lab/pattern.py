"""Bytes that both ends of a transfer can compute on their own, so that every one of them can be verified."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
WORD_BYTES = 8
_ODD = np.uint64(0x9E3779B97F4A7C15)
"""The golden ratio as an odd multiplier: neighbouring words differ in every byte."""


def pattern(first_word: int, n_words: int, seed: int) -> Words:
    """Return words [first_word, first_word + n_words) of the pattern of a seed."""
    words = np.arange(first_word + seed, first_word + seed + n_words, dtype=np.uint64)
    words *= _ODD
    return words


def count_wrong_bytes(words: Words, first_word: int, seed: int) -> int:
    """Count bytes that differ from the pattern."""
    expected = pattern(first_word, len(words), seed)
    if np.array_equal(words, expected):
        return 0
    return int(np.count_nonzero(words.view(np.uint8) != expected.view(np.uint8)))
