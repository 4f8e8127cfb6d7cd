"""Eras: a reading is stale exactly if an invalidation of its pages ran while it was open."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nopin.mm.sequence import Era, Eras, Reading, overlap_any
from nopin.ranges import Range, coalesce

HERE, THERE = Range(10, 20), Range(30, 40)


def test_a_reading_with_nothing_in_between_stands() -> None:
    eras = Eras()
    reading = eras.begin(HERE)
    assert not eras.retry(reading)


@pytest.mark.parametrize("where", [HERE, Range(19, 35), Range(0, 11)])
def test_an_invalidation_that_began_in_between_makes_it_stale_while_it_runs_and_after(where: Range) -> None:
    eras = Eras()
    reading = eras.begin(HERE)
    era = eras.start([where])
    assert eras.retry(reading)
    eras.end(era)
    assert eras.retry(reading)


def test_an_invalidation_that_ran_already_makes_it_stale_even_if_it_has_ended() -> None:
    eras = Eras()
    era = eras.start([HERE])
    reading = eras.begin(HERE)
    eras.end(era)
    assert eras.retry(reading)


def test_one_that_had_ended_before_does_not() -> None:
    eras = Eras()
    eras.end(eras.start([HERE]))
    assert not eras.retry(eras.begin(HERE))


def test_invalidations_elsewhere_never_make_it_stale_however_many_and_overlapping() -> None:
    eras = Eras()
    running = eras.start([THERE])
    reading = eras.begin(HERE)
    for _ in range(100):
        following = eras.start([THERE, Range(50, 60)])
        eras.end(running)
        running = following
    assert not eras.retry(reading)
    assert eras.retry(eras.begin(THERE))


def test_the_gap_of_a_batch_is_not_hit() -> None:
    eras = Eras()
    reading = eras.begin(Range(20, 30))
    eras.end(eras.start([HERE, THERE]))
    assert not eras.retry(reading)


@pytest.mark.parametrize("clock", [2**31 - 2, 2**32 - 2, 2**63 - 2, 2**64 - 2])
def test_the_clock_passes_every_machine_width(clock: int) -> None:
    """KVM once kept it in an int; after 2^31 invalidations what was stale looked fresh for ever."""
    eras = Eras(clock)
    for _ in range(4):
        reading = eras.begin(HERE)
        eras.end(eras.start([HERE]))
        assert eras.retry(reading)
        eras.close(reading)
        fresh = eras.begin(HERE)
        assert not eras.retry(fresh)
        eras.close(fresh)


def test_nothing_is_noted_without_readings_and_nothing_kept_that_no_open_one_needs() -> None:
    eras = Eras()
    for _ in range(10):
        eras.end(eras.start([HERE]))
    assert eras.n_noted == 0
    first = eras.begin(HERE)
    eras.end(eras.start([THERE]))
    second = eras.begin(HERE)
    eras.end(eras.start([THERE]))
    assert eras.n_noted == 4
    eras.close(first)
    assert eras.n_noted == 2
    eras.close(second)
    assert eras.n_noted == 0


def test_a_closed_reading_cannot_be_asked() -> None:
    eras = Eras()
    reading = eras.begin(HERE)
    eras.close(reading)
    with pytest.raises(AssertionError):
        eras.retry(reading)


spans = st.tuples(st.integers(0, 15), st.integers(1, 6)).map(lambda s: Range(s[0], s[0] + s[1]))
batches = st.lists(spans, min_size=1, max_size=3).map(coalesce)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("start"), batches),
        st.tuples(st.just("end"), st.integers(0, 3)),
        st.tuples(st.just("begin"), spans),
        st.tuples(st.just("close"), st.integers(0, 3)),
    ),
    max_size=40,
)


@given(steps)
def test_a_reading_is_stale_exactly_if_an_invalidation_of_its_pages_ran_while_it_was_open(
    script: list[tuple[str, object]],
) -> None:
    """The oracle keeps, for each open reading, every page that was under invalidation since it began."""
    eras = Eras()
    running: list[tuple[Era, list[Range]]] = []
    readings: list[tuple[Reading, set[int]]] = []

    def pages(ranges: list[Range]) -> set[int]:
        return {page for where in ranges for page in range(where.start, where.end)}

    for action, argument in script:
        if action == "start":
            assert isinstance(argument, list)
            running.append((eras.start(argument), argument))
            for _, hit in readings:
                hit |= pages(argument)
        elif action == "begin":
            assert isinstance(argument, Range)
            hit_now = {page for _, ranges in running for page in pages(ranges)}
            readings.append((eras.begin(argument), hit_now))
        elif action == "end" and running:
            assert isinstance(argument, int)
            eras.end(running.pop(argument % len(running))[0])
        elif action == "close" and readings:
            assert isinstance(argument, int)
            eras.close(readings.pop(argument % len(readings))[0])
        for reading, hit in readings:
            assert eras.retry(reading) == bool(hit & pages([reading.where]))


@given(st.lists(spans, max_size=5).map(coalesce), spans)
def test_overlap_is_what_looking_at_each_range_finds(ranges: list[Range], where: Range) -> None:
    assert overlap_any(ranges, where) == any(piece.overlaps(where) for piece in ranges)
