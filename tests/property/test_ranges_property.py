"""Range structures against the plainest model there is: a count per address."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nopin.ranges import CountedRanges, IntervalIndex, Range, coalesce, subtract

SPACE = 48


@st.composite
def small_ranges(draw: st.DrawFn) -> Range:
    start = draw(st.integers(0, SPACE - 1))
    return Range(start, draw(st.integers(start + 1, SPACE)))


def addresses(ranges: list[Range]) -> set[int]:
    return {address for piece in ranges for address in range(piece.start, piece.end)}


@given(st.lists(st.tuples(st.booleans(), small_ranges()), max_size=40))
def test_counted_ranges_agree_with_a_count_per_address(steps: list[tuple[bool, Range]]) -> None:
    covers, held = CountedRanges(), [0] * SPACE
    added: list[Range] = []
    for is_add, drawn in steps:
        if not is_add and not added:
            continue
        where = drawn if is_add else added.pop(drawn.start % len(added))
        if is_add:
            added.append(where)
        before = {address for address in range(SPACE) if held[address]}
        for address in range(where.start, where.end):
            held[address] += 1 if is_add else -1
        after = {address for address in range(SPACE) if held[address]}
        turned = covers.add(where) if is_add else covers.remove(where)
        assert addresses(turned) == before ^ after
        assert addresses(covers.covered(Range(0, SPACE))) == after
        assert bool(covers) == bool(after)
    assert {a: count for piece, count in covers for a in range(piece.start, piece.end)} == {
        address: count for address, count in enumerate(held) if count
    }


@given(st.lists(small_ranges()), small_ranges())
def test_coalesce_and_subtract_keep_exactly_the_right_addresses(ranges: list[Range], hole: Range) -> None:
    joined = coalesce(ranges)
    assert addresses(joined) == addresses(ranges)
    assert all(a.end < b.start for a, b in pairwise(joined))
    assert addresses(subtract(joined, hole)) == addresses(joined) - addresses([hole])


@given(st.lists(small_ranges()), st.data())
def test_the_index_finds_what_a_search_of_everything_finds(ranges: list[Range], data: st.DataObject) -> None:
    index: IntervalIndex[int] = IntervalIndex()
    held = {n: (where, index.insert(where, n)) for n, where in enumerate(ranges)}
    if held:
        for n in data.draw(st.sets(st.sampled_from(sorted(held)))):
            where, key = held.pop(n)
            index.remove(where, key)
    query = data.draw(small_ranges())
    assert sorted(index.overlapping(query)) == [n for n, (where, _) in held.items() if where.overlaps(query)]
