"""Moving bytes by scatter lists: every shape of list gives what copying byte after byte gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.iommu.moves import move
from nopin.mm.space import IoVec, Staging

SIZE = 4096


def moved_plainly(source: Staging, there: IoVec, target: Staging, here: IoVec) -> bytes:
    """Copy one byte at a time, in order."""
    result = bytearray(target.array.tobytes())
    sources = (at for start, length in there.tolist() for at in range(start, start + length))
    targets = (at for start, length in here.tolist() for at in range(start, start + length))
    for a, b in zip(sources, targets, strict=True):
        result[b] = source.array[a]
    return bytes(result)


def check(there: list[tuple[int, int]], here: list[tuple[int, int]]) -> None:
    source = Staging(np.random.default_rng(len(there)).integers(0, 256, SIZE, np.uint8))
    target = Staging(np.full(SIZE, 0xA5, np.uint8))
    lists = [np.array(segments, np.uint64).reshape(-1, 2) for segments in (there, here)]
    expected = moved_plainly(source, lists[0], target, lists[1])
    move(source, lists[0], target, lists[1])
    assert target.array.tobytes() == expected


def cut(total: int, draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw disjoint segments of a total length, in any order of addresses, some of them empty."""
    n = draw(st.integers(1, 12))
    ends = sorted(draw(st.lists(st.integers(0, total), min_size=n - 1, max_size=n - 1)))
    lengths = [b - a for a, b in zip([0, *ends], [*ends, total], strict=True)]
    gaps = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    placed, at = [], 0
    for gap, length in zip(gaps, lengths, strict=True):
        placed.append((at + gap, length))
        at += gap + length
    return draw(st.permutations(placed))


@st.composite
def irregular(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    total = draw(st.integers(1, 1000))
    return cut(total, draw), cut(total, draw)


@given(irregular())
def test_irregular_lists(lists: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    check(*lists)


@settings(max_examples=200)
@given(
    n=st.integers(1, 20),
    length=st.integers(1, 100),
    gap=st.integers(0, 60),
    last=st.integers(0, 100),
    first=st.integers(0, 50),
    flat=st.integers(0, 500),
)
def test_packets_of_one_size_at_one_distance(n: int, length: int, gap: int, last: int, first: int, flat: int) -> None:
    packets = [(first + k * (length + gap), length) for k in range(n)]
    packets.append((first + n * (length + gap), min(last, length)))
    whole = [(flat, sum(size for _, size in packets))]
    check(packets, whole)
    check(whole, packets)


@given(
    length=st.integers(1, 64),
    starts=st.lists(st.tuples(st.integers(0, SIZE - 64), st.integers(0, 60)), min_size=8, max_size=50),
)
def test_many_tiny_segments_where_later_ones_win(length: int, starts: list[tuple[int, int]]) -> None:
    there = [(a, length) for a, _ in starts]
    here = [(60 * 64 - b * 64 + b, length) for _, b in starts]  # some of them the same
    check(there, here)


@pytest.mark.parametrize("step", [0, 3])
def test_regular_looking_lists_that_overlap_are_moved_in_order(step: int) -> None:
    check([(0, 80)], [(100 + k * step, 8) for k in range(10)])
