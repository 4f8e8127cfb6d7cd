"""Watching a real owner: what it does to its mappings arrives with its cause; what it stores does not."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest
from owner_process import MADV_DONTNEED, Owner

from nopin.errors import HostLacks
from nopin.linux.proc import Maps
from nopin.linux.process_memory import ProcessMemory
from nopin.linux.uffd_handshake import Feature
from nopin.linux.userfaultfd import Userfaultfd, open_watch
from nopin.mm.causes import Cause
from nopin.mm.notifier import Notifiers
from nopin.mm.plain import PlainSpace
from nopin.mm.space import Staging
from nopin.ranges import Range
from nopin.server.watch import Watcher
from nopin.testing.recorder import Recorder
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
N_PAGES = 16


def events_here() -> Feature:
    try:
        fd, features = open_watch()
    except HostLacks:
        return Feature(0)
    os.close(fd)
    return features


HERE = events_here()
pytestmark = [
    pytest.mark.needs_userfaultfd,
    pytest.mark.skipif(not HERE, reason="userfaultfd events are not available here"),
]
needs_fork_events = pytest.mark.skipif(Feature.EVENT_FORK not in HERE, reason="fork events need privilege")


class Watched:
    """An owner, a watch over it, and what was heard."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.recorder = Recorder()
        self.notifiers = Notifiers()
        self.maps = Maps(owner.pid)
        uffd = Userfaultfd(owner.open_watch())
        self.watcher = Watcher(uffd, self.notifiers, lambda r: (m.where for m in self.maps.within(r)))
        self.notifiers.subscribe(Range(0, 1 << 47), self.recorder)

    def do(self, action: str, *arguments: object) -> object:
        """Have the owner do it, reading messages as a server does."""
        self.owner.begin(action, *arguments)
        while self.owner.is_busy():
            if select.select([self.watcher.fileno()], [], [], 0.001)[0]:
                self.watcher.drain()
        self.watcher.drain()
        return self.owner.finish()

    def take(self) -> list[tuple[Cause, Range]]:
        taken = [(event.cause, event.hull) for event in self.recorder.heard]
        self.recorder.heard.clear()
        return taken


@pytest.fixture
def watched() -> Iterator[Watched]:
    with Owner() as owner:
        watched = Watched(owner)
        yield watched
        watched.watcher.close()
        watched.maps.close()


@pytest.fixture
def region(watched: Watched) -> Range:
    region = Range.of_length(watched.owner.do("map", N_PAGES * PAGE), N_PAGES * PAGE)
    assert watched.watcher.watch(region)
    return region


def pages(region: Range, first: int, n_pages: int) -> Range:
    return Range.of_length(region.start + first * PAGE, n_pages * PAGE)


def test_dropping_pages_is_heard_as_remove_and_the_watch_goes_on(watched: Watched, region: Range) -> None:
    for _ in range(2):
        watched.do("advise", region.start, 2 * PAGE, MADV_DONTNEED)
        assert watched.take() == [(Cause.REMOVE, pages(region, 0, 2))]
    assert not watched.watcher.needs_rearm


def test_unmapping_is_heard_and_a_new_mapping_is_watched_after_rearm(watched: Watched, region: Range) -> None:
    hole = pages(region, 3, 2)
    watched.do("unmap", hole.start, hole.length)
    assert watched.take() == [(Cause.UNMAP, hole)]
    assert watched.watcher.unwatched(region) == [hole]
    watched.watcher.rearm()
    assert watched.watcher.needs_rearm
    watched.do("map", hole.length, hole.start)
    watched.watcher.rearm()
    assert not watched.watcher.needs_rearm
    watched.do("advise", hole.start, PAGE, MADV_DONTNEED)
    assert watched.take() == [(Cause.REMOVE, pages(region, 3, 1))]


def test_memory_mapped_into_a_hole_of_a_covered_range_is_watched_after_rearm(watched: Watched) -> None:
    region = Range.of_length(watched.owner.do("map", N_PAGES * PAGE), N_PAGES * PAGE)
    hole = pages(region, 5, 2)
    watched.do("unmap", hole.start, hole.length)
    assert not watched.watcher.watch(region)
    assert watched.watcher.unwatched(region) == [hole]
    watched.do("map", hole.length, hole.start)
    watched.watcher.rearm()
    assert not watched.watcher.needs_rearm
    watched.do("advise", hole.start, PAGE, MADV_DONTNEED)
    assert watched.take() == [(Cause.REMOVE, pages(region, 5, 1))]


def test_mapping_over_a_watched_range_is_heard_as_unmap(watched: Watched, region: Range) -> None:
    watched.do("map", PAGE, region.start)
    assert watched.take() == [(Cause.UNMAP, pages(region, 0, 1))]


def test_moving_is_heard_and_nobody_watches_the_new_place(watched: Watched, region: Range) -> None:
    target = watched.owner.do("map", 2 * PAGE)
    moved = pages(region, 4, 2)
    watched.do("move", moved.start, moved.length, target)
    assert watched.take()[0] == (Cause.REMAP, moved)
    watched.do("advise", target, PAGE, MADV_DONTNEED)
    assert watched.take() == []


@pytest.mark.needs_root
def test_what_another_userfaultfd_has_is_claimed_and_the_rest_is_not(watched: Watched, region: Range) -> None:
    others = Range.of_length(watched.owner.do("map", 4 * PAGE), 4 * PAGE)
    watched.do("hold_back", others.start, PAGE)
    watcher = watched.watcher
    assert watcher.unclaimed(region)
    assert watcher.unclaimed(pages(others, 1, 3))
    assert not watcher.unclaimed(pages(others, 0, 1))
    watched.do("unmap", others.start + PAGE, 3 * PAGE)
    assert watched.take() == [], "what was asked about is not watched"
    assert not watcher.watch(pages(others, 0, 1))
    assert not watcher.unclaimed(pages(others, 0, 1))


def test_what_is_mapped_anew_over_watched_memory_is_known_to_be_free_at_once_and_watched_again(
    watched: Watched, region: Range
) -> None:
    """Otherwise memory that is mapped anew all the time would count as held back, and its accesses starve."""
    part = pages(region, 2, 5)
    watched.do("unmap", part.start, part.length)
    assert watched.watcher.unwatched(region) == [part]
    assert watched.do("map", part.length, part.start) == part.start
    watched.take()
    assert watched.watcher.unclaimed(part)
    assert not watched.watcher.unwatched(region)
    watched.do("unmap", part.start, PAGE)
    assert watched.take() == [(Cause.UNMAP, pages(region, 2, 1))]
    assert not watched.watcher.unclaimed(part), "a hole is not known to be anything"


@needs_fork_events
def test_a_fork_is_heard_and_the_child_is_not_watched(watched: Watched, region: Range) -> None:
    before = len(os.listdir("/proc/self/fd"))
    watched.do("fork")
    ((cause, where),) = watched.take()
    assert cause is Cause.FORK
    assert where.contains(region)
    assert len(os.listdir("/proc/self/fd")) == before
    watched.do("end_children")


def test_the_owners_own_faults_and_the_devices_copies_send_nothing(watched: Watched, region: Range) -> None:
    space = PlainSpace(ProcessMemory.open(watched.owner.pid))
    staging = Staging.of_size(region.length)
    staging.array[:] = 7
    # No reader runs here: an owner whose fault waited for us would never answer.
    watched.owner.do("put", region.start, b"x" * (4 * PAGE))
    watched.owner.do("get", region.start, region.length)
    assert space.write(region.start, region.length, staging, 0) == region.length
    assert watched.owner.do("get", region.start, region.length) == bytes([7]) * region.length
    watched.owner.do("advise", region.start, region.length, 0)
    assert watched.watcher.drain() == 0
    space.close()


def test_overlapping_covers_are_watched_until_the_last_one_goes(watched: Watched, region: Range) -> None:
    front, back = pages(region, 0, 10), pages(region, 5, 11)
    watched.watcher.unwatch(region)
    watched.watcher.watch(front)
    watched.watcher.watch(back)
    watched.watcher.unwatch(front)
    watched.do("advise", region.start, region.length, MADV_DONTNEED)
    assert watched.take() == [(Cause.REMOVE, back)]
    watched.watcher.unwatch(back)
    watched.do("advise", region.start, region.length, MADV_DONTNEED)
    assert watched.take() == []


def test_what_lies_within_a_page_watches_the_page(watched: Watched, region: Range) -> None:
    watched.watcher.unwatch(region)
    assert watched.watcher.watch(Range(region.start + 4090, region.start + 4100))
    watched.do("advise", region.start, region.length, MADV_DONTNEED)
    assert watched.take() == [(Cause.REMOVE, pages(region, 0, 2))]


def test_unmapped_parts_are_reported_and_watched_once_mapped(watched: Watched, region: Range) -> None:
    beyond = watched.owner.do("map", 4 * PAGE)
    watched.owner.do("unmap", beyond, 4 * PAGE)
    where = Range.of_length(beyond, 4 * PAGE)
    assert not watched.watcher.watch(where)
    assert watched.watcher.unwatched(where) == [where]
    watched.watcher.unwatch(where)
    assert not watched.watcher.needs_rearm


def test_everything_can_be_watched_as_far_as_it_is_mapped(watched: Watched, region: Range) -> None:
    everything = Range(0, (1 << 64) - 1)
    assert not watched.watcher.watch(everything)
    assert watched.watcher.unwatched(region) == []
    elsewhere = watched.do("map", PAGE)
    watched.watcher.rearm()
    watched.recorder.heard.clear()
    watched.do("advise", elsewhere, PAGE, MADV_DONTNEED)
    assert [cause for cause, _ in watched.take()] == [Cause.REMOVE]
    watched.watcher.unwatch(everything)


def test_a_watch_that_ends_frees_an_owner_that_waits(watched: Watched, region: Range) -> None:
    watched.owner.begin("unmap", region.start, PAGE)
    assert select.select([watched.watcher.fileno()], [], [], 5.0)[0]
    assert watched.owner.is_busy()
    watched.watcher.close()
    watched.owner.finish()


def test_an_owner_that_dies_leaves_a_silent_watch(watched: Watched, region: Range) -> None:
    watched.owner.kill()
    assert watched.watcher.drain() == 0
    watched.watcher.unwatch(region)
