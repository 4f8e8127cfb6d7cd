"""Windows: which byte of which arena an address is, whatever was laid over what."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nopin.iommu.windows import DeviceArena, WindowedSpace
from nopin.ranges import Range
from nopin.testing.memory_space import MemorySpace
from nopin.testing.paged_arena import PagedArena
from nopin.units import PAGE_BYTES

N_PAGES = 24
ARENAS: list[DeviceArena] = [PagedArena(N_PAGES).device, PagedArena(N_PAGES).device]

pages = st.tuples(st.integers(0, N_PAGES - 1), st.integers(1, 8)).map(lambda p: (p[0], min(p[1], N_PAGES - p[0])))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), pages, st.integers(0, 1), st.integers(0, N_PAGES - 8)),
        st.tuples(st.just("remove"), pages, st.just(0), st.just(0)),
        st.tuples(st.just("drop"), st.just((0, 1)), st.integers(0, 1), st.just(0)),
    ),
    max_size=10,
)


@given(steps, st.integers(0, N_PAGES * PAGE_BYTES - 1), st.integers(1, 5 * PAGE_BYTES))
def test_every_byte_of_an_access_is_where_the_last_change_put_it(
    script: list[tuple[str, tuple[int, int], int, int]], address: int, length: int
) -> None:
    """The oracle is one entry a page: (arena, page of the arena) or None."""
    space = WindowedSpace(MemorySpace(0, 1))
    truth: list[tuple[DeviceArena, int] | None] = [None] * N_PAGES
    for action, (first, n), which, target in script:
        where = Range(first * PAGE_BYTES, (first + n) * PAGE_BYTES)
        arena = ARENAS[which]
        if action == "add":
            space.add(where, arena, target * PAGE_BYTES)
            truth[first : first + n] = [(arena, target + k) for k in range(n)]
        elif action == "remove":
            space.remove(where)
            truth[first : first + n] = [None] * n
        else:
            space.drop(arena)
            truth = [None if entry is not None and entry[0] is arena else entry for entry in truth]
    length = min(length, N_PAGES * PAGE_BYTES - address)
    at = address
    for part in space.parts(address, length):
        assert part.address == at
        assert part.length > 0
        for byte in np.unique([part.address, part.address + part.length - 1, *range(at, at + part.length, 97)]):
            entry = truth[byte // PAGE_BYTES]
            if part.window is None:
                assert entry is None
            else:
                place = part.window.at(int(byte))
                assert entry == (part.window.arena, place // PAGE_BYTES)
                assert place % PAGE_BYTES == byte % PAGE_BYTES
        at += part.length
    assert at == address + length
    found = space.find(address, length)
    if found is not None:
        assert [part.window for part in space.parts(address, length)] == [found]
