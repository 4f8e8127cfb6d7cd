"""How many pages a fault brings: streams are found, random accesses are left alone."""

from __future__ import annotations

import random

from nopin.mm.readahead import RECENT, STRIDE_WINDOW_MAX, WINDOW_MAX, Ahead, Readahead


def faults_of(ahead: Readahead, who: int, pages: list[int]) -> list[int]:
    """Touch pages in order; returns those that faulted because nothing had brought them."""
    there: set[int] = set()
    faulted = []
    for page in pages:
        if page not in there:
            faulted.append(page)
            n, stride = ahead.of(who).advise(page)
            there |= set(range(page, page + n * stride, stride))
    return faulted


def test_a_sequential_stream_soon_faults_once_in_a_whole_window() -> None:
    faulted = faults_of(Readahead(), 1, list(range(100, 100 + 8 * WINDOW_MAX)))
    assert len(faulted) < 20
    assert faulted[-1] - faulted[-2] == WINDOW_MAX


def test_a_stride_is_found_too() -> None:
    pages = list(range(0, 7 * 400, 7))
    faulted = faults_of(Readahead(), 1, pages)
    assert len(faulted) < 400 // STRIDE_WINDOW_MAX + 10
    backwards = faults_of(Readahead(), 1, pages[::-1])
    assert len(backwards) < 400 // STRIDE_WINDOW_MAX + 10


def test_two_streams_of_one_process_and_one_of_another_do_not_disturb_each_other() -> None:
    ahead = Readahead()
    there: set[int] = set()
    n_faults = 0
    for step in range(2000):
        for who, start in ((1, 0), (1, 100_000), (2, 200_000)):
            page = start + step
            if page not in there:
                n_faults += 1
                n, stride = ahead.of(who).advise(page)
                there |= set(range(page, page + n * stride, stride))
    assert n_faults < 3 * 20


def test_random_accesses_bring_single_pages() -> None:
    draw, ahead = random.Random(1), Readahead()
    brought = [ahead.of(1).advise(draw.randrange(1 << 24)).n for _ in range(1000)]
    assert sum(brought) < 1000 + RECENT


def test_a_window_that_could_not_be_brought_whole_is_met_where_it_ended() -> None:
    ahead = Readahead()
    ahead.of(1).advise(0)
    asked = ahead.of(1).advise(1)
    ahead.of(1).brought(1, asked, 2)
    assert ahead.of(1).advise(3) == Ahead(2 * asked.n, 1)
