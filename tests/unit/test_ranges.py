"""Ranges, counted covers and the interval index, case by case."""

from __future__ import annotations

import pytest

from nopin.ranges import CountedRanges, IntervalIndex, Range, coalesce, subtract


def test_an_empty_or_backward_range_does_not_exist() -> None:
    for start, end in ((5, 5), (6, 5), (-1, 3)):
        with pytest.raises(ValueError, match="not a range"):
            Range(start, end)


def test_touching_ranges_do_not_overlap() -> None:
    assert not Range(0, 10).overlaps(Range(10, 20))
    assert Range(0, 11).overlaps(Range(10, 20))
    assert Range(0, 10).intersection(Range(10, 20)) is None
    assert Range(0, 12).intersection(Range(10, 20)) == Range(10, 12)


def test_rounding_to_pages_takes_every_touched_page() -> None:
    assert Range(4095, 4097).to_pages() == Range(0, 8192)
    assert Range(4096, 8192).to_pages() == Range(4096, 8192)


def test_an_address_prints_as_hex() -> None:
    assert str(Range(0x1000, 0x2000)) == "[0x1000, 0x2000)"


def test_coalesce_joins_what_touches_and_keeps_gaps() -> None:
    assert coalesce([Range(8, 9), Range(0, 2), Range(2, 4), Range(1, 3)]) == [Range(0, 4), Range(8, 9)]


def test_subtract_cuts_a_hole_through_the_middle() -> None:
    assert subtract([Range(0, 10), Range(20, 30)], Range(5, 25)) == [Range(0, 5), Range(25, 30)]
    assert subtract([Range(0, 10)], Range(3, 4)) == [Range(0, 3), Range(4, 10)]
    assert subtract([Range(0, 10)], Range(0, 10)) == []
    assert subtract([Range(0, 10)], Range(10, 20)) == [Range(0, 10)]


def test_only_what_was_uncovered_becomes_covered() -> None:
    covers = CountedRanges()
    assert covers.add(Range(10, 20)) == [Range(10, 20)]
    assert covers.add(Range(5, 30)) == [Range(5, 10), Range(20, 30)]
    assert covers.add(Range(6, 8)) == []


def test_only_the_last_cover_uncovers() -> None:
    covers = CountedRanges()
    covers.add(Range(10, 20))
    covers.add(Range(15, 25))
    assert covers.remove(Range(10, 20)) == [Range(10, 15)]
    assert covers.remove(Range(15, 25)) == [Range(15, 25)]
    assert not covers


def test_removing_what_is_not_covered_is_refused_and_changes_nothing() -> None:
    covers = CountedRanges()
    covers.add(Range(10, 20))
    with pytest.raises(ValueError, match="not covered everywhere"):
        covers.remove(Range(15, 25))
    assert list(covers) == [(Range(10, 20), 1)]


def test_an_interval_that_starts_far_before_is_found_behind_short_ones() -> None:
    index: IntervalIndex[str] = IntervalIndex()
    index.insert(Range(0, 1000), "long")
    for start in range(10, 500, 10):
        index.insert(Range(start, start + 5), f"short {start}")
    assert index.overlapping(Range(600, 601)) == ["long"]
    assert index.overlapping(Range(21, 22)) == ["long", "short 20"]
    assert index.overlapping(Range(1000, 1001)) == []


def test_equal_intervals_are_told_apart_by_key() -> None:
    index: IntervalIndex[str] = IntervalIndex()
    first = index.insert(Range(0, 10), "first")
    index.insert(Range(0, 10), "second")
    index.remove(Range(0, 10), first)
    assert list(index) == ["second"]
    with pytest.raises(KeyError):
        index.remove(Range(0, 10), first)
