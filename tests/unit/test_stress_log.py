"""The checker of stress runs: it lets every word pass that can be there, and no other."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.lab.stress.log import CELLS, PAGE_WORDS, WORDS, Layout, Log, Words

LAYOUT = Layout(n_plain=2, n_given_up=1, n_counting=1)
PAGE, CELL = 1, 5
ALL = slice(0, 3)


@pytest.fixture
def log() -> Log:
    return Log(np.zeros(LAYOUT.log_bytes, np.uint8), LAYOUT)


@pytest.fixture
def memory() -> Words:
    return np.zeros((3, CELLS, WORDS), np.int64)


def store(log: Log, memory: Words, page: int = PAGE, cell: int = CELL) -> Words:
    """Store the next number; returns the words."""
    words = log.announce(page, cell)
    memory[page, cell] = words
    log.note(page, cell)
    return words


def test_what_was_stored_last_is_right_and_untouched_cells_are_zeros(log: Log, memory: Words) -> None:
    for _ in range(3):
        store(log, memory)
        assert log.judge("a", ALL, memory, log.before(ALL)) is None


def test_old_words_are_wrong_one_by_one_and_it_is_said_what_could_be_there(log: Log, memory: Words) -> None:
    old = store(log, memory).copy()
    store(log, memory)
    store(log, memory)
    memory[PAGE, CELL, 3] = old[3]
    wrong = log.judge("somebody", ALL, memory, log.before(ALL))
    assert wrong is not None
    assert (wrong.page, wrong.cell, wrong.word, wrong.found_number) == (PAGE, CELL, 3, 1)
    assert "somebody: page 1 cell 5 word 3" in str(wrong)
    assert "numbers 3 to 3 could be there" in str(wrong)


def test_zeros_in_place_of_a_stored_number_are_wrong(log: Log, memory: Words) -> None:
    store(log, memory)
    memory[PAGE, CELL, 7] = 0
    assert log.judge("a", ALL, memory, log.before(ALL)) is not None


def test_a_number_that_nobody_announced_is_wrong(log: Log, memory: Words) -> None:
    memory[PAGE, CELL] = 2 * store(log, memory)
    assert log.judge("a", ALL, memory, log.before(ALL)) is not None


def test_words_of_another_place_are_wrong_though_their_number_is_right(log: Log, memory: Words) -> None:
    store(log, memory)
    store(log, memory, cell=CELL + 1)
    memory[PAGE, CELL] = memory[PAGE, CELL + 1]
    assert log.judge("a", ALL, memory, log.before(ALL)) is not None


def test_a_read_while_a_store_is_under_way_may_find_old_and_new_words_mixed(log: Log, memory: Words) -> None:
    store(log, memory)
    least = log.before(ALL)
    words = log.announce(PAGE, CELL)
    assert log.judge("a", ALL, memory, least) is None
    memory[PAGE, CELL, :4] = words[:4]
    assert log.judge("a", ALL, memory, least) is None
    memory[PAGE, CELL] = words
    log.note(PAGE, CELL)
    assert log.judge("a", ALL, memory, least) is None, "it began before the store had ended"


def test_bytes_given_up_are_old_or_zeros_while_that_goes_on_then_zeros_then_what_is_stored(
    log: Log, memory: Words
) -> None:
    page, pages = 2, slice(2, 3)
    store(log, memory, page)
    before = memory.copy()
    log.announce_removal(pages)
    least = log.before(ALL)
    memory[page] = 0
    assert log.judge("a", ALL, before, least) is None
    assert log.judge("a", ALL, memory, least) is None
    log.note_removal(pages)
    least = log.before(ALL)
    assert log.judge("a", ALL, memory, least) is None
    assert log.judge("a", ALL, before, least) is not None, "they came back"
    store(log, memory, page)
    assert log.judge("a", ALL, memory, log.before(ALL)) is None
    memory[page, CELL] = 0
    assert log.judge("a", ALL, memory, log.before(ALL)) is not None, "what was stored afterwards is lost"


def test_counters_are_between_what_is_done_and_what_has_begun(log: Log) -> None:
    found = np.zeros(PAGE_WORDS, np.int64)
    log.begun[0, 9] += 2
    log.done[0, 9] += 1
    log.begun[1, 9] += 1
    least = log.sum_done()
    for value, right in ((0, False), (1, True), (3, True), (4, False)):
        found[9] = value
        wrong = log.judge_sums("a", found, least)
        assert (wrong is None) is right, value
        if wrong is not None:
            assert (wrong.page, wrong.cell, wrong.word) == (LAYOUT.n_cells_pages, 1, 1)
