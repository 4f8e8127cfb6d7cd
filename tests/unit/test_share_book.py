"""The share book: whole at any moment, read back as written, and judged like anything that a client can write."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from nopin.control.share_book import SLOT_BYTES, BookFull, ShareBook, ShareEntry


def entry(name: str, **changed: object) -> ShareEntry:
    fields: dict[str, object] = {
        "name": name,
        "token": bytes(32),
        "address": 0x1000,
        "length": 4096,
        "iova": 0x1000,
        "access": 7,
        "discipline": 0,
        "ring_fd": None,
        "dtype": "<i8",
        "shape": [512],
        "strides": [8],
        "offset": 0,
    }
    return ShareEntry(**(fields | changed))  # type: ignore[arg-type]  # any field


def pages(n_slots: int) -> NDArray[np.uint8]:
    return np.zeros(n_slots * SLOT_BYTES, np.uint8)


def names(memory: NDArray[np.uint8]) -> list[str]:
    return sorted(each.name for each in ShareBook(memory, memory.tobytes()).entries)


def test_a_successor_reads_what_was_written_and_not_struck_out() -> None:
    memory = pages(4)
    book = ShareBook(memory)
    whole = entry("whole process", address=0, length=None, iova=0, dtype="|u1", shape=[1 << 47], strides=[1])
    for each in (entry("a"), whole, entry("b")):
        book.note(each)
    book.strike("a")
    assert sorted(ShareBook(memory, memory.tobytes()).entries, key=lambda each: each.name) == [entry("b"), whole]


def test_a_slot_is_used_again_by_the_next_one_who_has_the_book() -> None:
    memory = pages(2)
    ShareBook(memory).note(entry("a"))
    second = ShareBook(memory, memory.tobytes())
    second.note(entry("b"))
    with pytest.raises(BookFull):
        second.note(entry("c"))
    second.strike("a")
    second.strike("never there")
    second.note(entry("c"))
    assert names(memory) == ["b", "c"]


def test_an_array_of_most_dimensions_fits_and_what_does_not_is_refused_whole() -> None:
    memory = pages(1)
    book = ShareBook(memory)
    with pytest.raises(BookFull):
        book.note(entry("x" * SLOT_BYTES))
    assert not memory.any()
    book.note(entry("n" * 64, dtype="<U999999999", shape=[1 << 62] * 64, strides=[-(1 << 62)] * 64))
    assert names(memory) == ["n" * 64]


def test_a_writer_killed_after_any_store_leaves_the_old_shares_and_no_broken_one() -> None:
    memory = pages(2)
    ShareBook(memory).note(entry("old"))
    before = memory.copy()
    ShareBook(memory, memory.tobytes()).note(entry("new"))
    changed = np.flatnonzero(memory != before)
    text, header = changed[changed >= SLOT_BYTES + 8], changed[changed < SLOT_BYTES + 8]
    for n in range(len(changed)):
        torn = before.copy()
        done = np.concatenate([text, header])[:n]  # the order in which it writes
        torn[done] = memory[done]
        assert names(torn) == ["old"]


def test_any_byte_that_a_client_scribbles_costs_it_that_share_at_most() -> None:
    memory = pages(2)
    book = ShareBook(memory)
    book.note(entry("a"))
    book.note(entry("b"))
    draw = np.random.default_rng(5)
    for at in np.flatnonzero(memory[:SLOT_BYTES]):
        scribbled = memory.copy()
        scribbled[at] ^= draw.integers(1, 256)
        assert names(scribbled) in (["b"], ["a"])
    assert names(draw.integers(0, 256, 2 * SLOT_BYTES, np.uint8)) == []
