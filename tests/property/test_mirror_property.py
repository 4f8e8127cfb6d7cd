"""The mirror against the plainest model there is: four sets of page numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.iommu.mirror import CHUNK_PAGES
from nopin.mm.causes import Cause
from nopin.mm.effects import PageRun
from nopin.ranges import Range
from nopin.testing.paged_arena import PagedArena

N_PAGES = 3 * CHUNK_PAGES
EDGES = [0, 1, CHUNK_PAGES - 1, CHUNK_PAGES, CHUNK_PAGES + 1, 2 * CHUNK_PAGES - 2, 2 * CHUNK_PAGES, N_PAGES - 1]

firsts = st.one_of(st.sampled_from(EDGES), st.integers(0, N_PAGES - 1))
lengths = st.one_of(st.integers(1, 4), st.sampled_from([CHUNK_PAGES, CHUNK_PAGES + 1, N_PAGES]))
runs = st.tuples(firsts, lengths).map(lambda r: (r[0], min(r[1], N_PAGES - r[0])))
steps = st.lists(
    st.tuples(
        st.sampled_from(["fill", "use", "use_pages", "drop", "protect", "sync", "age"]), runs, runs, st.booleans()
    ),
    max_size=25,
)


@dataclass
class Model:
    present: set[int] = field(default_factory=set)
    writable: set[int] = field(default_factory=set)
    young: set[int] = field(default_factory=set)
    dirty: set[int] = field(default_factory=set)

    def use(self, pages: set[int], *, write: bool) -> bool:
        if not pages <= (self.writable if write else self.present):
            return False
        self.young |= pages
        if write:
            self.dirty |= pages
        return True

    def take(self, of: str, pages: set[int]) -> set[int]:
        bits: set[int] = getattr(self, of)
        taken = bits & pages
        bits -= pages
        return taken


def numbers(run: tuple[int, int]) -> set[int]:
    return set(range(run[0], run[0] + run[1]))


@settings(max_examples=60, deadline=None)
@given(steps)
def test_every_answer_is_that_of_four_sets(script: list[tuple[str, tuple[int, int], tuple[int, int], bool]]) -> None:
    arena, model = PagedArena(N_PAGES), Model()
    mirror, notifiers = arena.mirror, arena.notifiers
    for action, run, other, write in script:
        pages, both = numbers(run), numbers(run) | numbers(other)
        ranges = [Range(first, first + n) for first, n in (run, other)]
        if action == "fill":
            mirror.unhold(PageRun(*run), arena.run(mirror.fill(PageRun(*run), write=write)))
            model.present |= pages
            model.writable |= pages if write else set()
        elif action == "use":
            assert mirror.use(*run, write=write) == model.use(pages, write=write)
        elif action == "use_pages":
            assert mirror.use_pages(np.array(sorted(both)), write=write) == model.use(both, write=write)
        elif action == "age":
            merged = notifiers.age([ranges[0]], clear=write)
            assert merged == model.young & pages
            model.young -= pages if write else set()
        else:
            cause = {"drop": Cause.RECLAIM, "protect": Cause.PROTECT, "sync": Cause.SYNC}[action]
            bracket = notifiers.invalidate_start(ranges, cause)
            bracket.end()
            assert bracket.harvest.dirty == model.take("dirty", both)
            if cause is Cause.RECLAIM:
                assert bracket.harvest.young == model.take("young", both)
                model.take("present", both)
            if cause is not Cause.SYNC:
                model.take("writable", both)
        mirror.check()
        allowed = model.writable if write else model.present
        assert mirror.n_missing(*run, write=write) == len(pages - allowed)
        missing = sorted(pages - allowed)
        assert mirror.n_held(*run, write=write) == (missing[0] - run[0] if missing else run[1])
        bits = np.unpackbits(mirror.dirty_bitmap(PageRun(*run)), bitorder="little")[: run[1]]
        assert {run[0] + int(at) for at in np.flatnonzero(bits)} == model.dirty & pages
    assert mirror.statistics().n_present == len(model.present)
