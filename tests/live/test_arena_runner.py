"""The live runner and an arena's mappers, with a small pager and a process that touches."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fifo_pager import FifoPager
from numpy.typing import NDArray
from owner_process import MADV_DONTNEED, MADV_REMOVE, Owner

from nopin.iommu.mirror import Mirror
from nopin.iommu.windows import DeviceArena
from nopin.linux import memfd
from nopin.linux.fd_store import FdStore
from nopin.linux.paging_uffd import PagingUffd
from nopin.linux.pidfd import PidFd
from nopin.linux.swap_file import SwapFile
from nopin.mm.arena_pages import News
from nopin.mm.effects import PageRun, WriteProtect
from nopin.mm.notifier import Notifiers
from nopin.mm.residency import Budget
from nopin.server.arena import Arena
from nopin.server.arena_machine import ServerMapping
from nopin.server.arena_maker import ArenaParts, Family
from nopin.server.arena_store import VERSION, ArenaEntry, ArenaStore, MapperEntry
from nopin.server.arenas import Arenas
from nopin.server.mapper import Mapper, Placed
from nopin.server.poller import Poller
from nopin.server.timers import Timers
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
N_PAGES = 256
NOBODY = 65534
pytestmark = pytest.mark.needs_userfaultfd


class Rig:
    """An arena of 256 pages, 32 of them resident at most, mapped by a process; and a loop."""

    def __init__(self, directory: Path, owner: Owner, file: int) -> None:
        self.poller = Poller()
        self.timers = Timers()
        self.arenas = Arenas(self.poller, self.timers, time.monotonic_ns)
        self.owner = owner
        frames = ServerMapping(file, N_PAGES)
        self.pager = FifoPager(frames, 32)
        self.swap = SwapFile(directory)
        table = memfd.create("table", PAGE)
        notifiers = Notifiers()
        device = DeviceArena(Mirror(notifiers, self.pager, N_PAGES), frames.memory)
        self.arena: Arena = self.arenas.create(
            "test",
            ArenaParts(
                ArenaEntry(VERSION, "test", N_PAGES, None, 1, 32),
                Family(1, Budget(32)),
                frames,
                table,
                self.swap,
                Budget(32),
                notifiers,
                self.pager,
                News(),
                device,
                ArenaStore(FdStore.create()),
            ),
        )
        self.address, number, _ = owner.do("map_paged", file, N_PAGES * PAGE)
        process = PidFd.open(owner.pid)
        place = Placed(0, N_PAGES, self.address)
        self.mapper: Mapper = self.arena.map(PagingUffd(process.take_fd(number)), place, process, worker=False)

    def at(self, page: int) -> int:
        return int(self.address) + page * PAGE

    def turn(self) -> None:
        self.poller.poll(0.001)
        self.timers.run(time.monotonic_ns())
        self.arenas.turn()

    def until(self, true: Callable[[], bool]) -> None:
        while not true():
            self.turn()

    def do(self, action: str, *arguments: object) -> object:
        """Have the owner do something and serve it meanwhile."""
        self.owner.begin(action, *arguments)
        self.until(lambda: not self.owner.is_busy())
        return self.owner.finish()

    def get(self, page: int, length: int = PAGE) -> bytes:
        got = self.do("get", self.at(page), length)
        assert isinstance(got, bytes)
        return got

    def put(self, page: int, data: bytes) -> None:
        self.do("put", self.at(page), data)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    file = memfd.create("frames", N_PAGES * PAGE)
    with Owner() as owner:
        made = Rig(tmp_path, owner, file)
        yield made
    made.arena.give_up()
    for mapper in made.arena.mappers:
        made.arena.unmap(mapper)
    made.until(lambda: not made.arenas.all)
    made.arenas.close()
    made.poller.close()


def test_a_touched_page_is_zero_and_counted(rig: Rig) -> None:
    assert rig.get(5) == bytes(PAGE)
    assert rig.pager.counts.faults == 1
    assert rig.arena.file_bytes == PAGE
    assert sum(rig.arena.latency["missing"]) == 1


def test_eight_times_the_budget_keeps_every_byte(rig: Rig) -> None:
    data = np.random.default_rng(1).bytes(N_PAGES * PAGE)
    rig.put(0, data)
    assert rig.pager.counts.evictions >= N_PAGES - 32
    assert rig.arena.file_bytes <= 33 * PAGE
    assert rig.get(0, N_PAGES * PAGE) == data
    assert rig.pager.counts.swap_in >= N_PAGES - 32
    assert rig.get(100, 7 * PAGE) == data[100 * PAGE : 107 * PAGE]


def test_the_server_sees_the_bytes_without_a_copy(rig: Rig) -> None:
    rig.put(3, b"shared")
    assert rig.arena.parts.frames.memory.array[3 * PAGE : 3 * PAGE + 6].tobytes() == b"shared"
    rig.arena.parts.frames.memory.array[3 * PAGE] = ord("S")
    assert rig.get(3, 6) == b"Shared"


def test_a_device_fault_fills_through_the_servers_mapping(rig: Rig) -> None:
    rig.put(0, b"kept")
    for page in range(1, 40):
        rig.get(page, 1)
    assert 0 in rig.pager.swapped
    results: list[object] = []
    rig.arena.runner.start(rig.pager.device_fault(PageRun(0, 2), write=False), results.append)
    rig.until(lambda: bool(results))
    assert rig.arena.parts.frames.memory.array[:4].tobytes() == b"kept"
    assert rig.get(0, 4) == b"kept"


def test_two_threads_of_work_on_the_same_busy_page_go_on_in_turn(rig: Rig) -> None:
    rig.put(0, b"x")
    for page in range(1, 40):
        rig.get(page, 1)
    results: list[str] = []
    rig.arena.runner.start(rig.pager.device_fault(PageRun(0, 1), write=False), lambda _: results.append("first"))
    rig.arena.runner.start(rig.pager.device_fault(PageRun(0, 1), write=False), lambda _: results.append("second"))
    rig.until(lambda: len(results) == 2)
    assert results == ["first", "second"]
    assert rig.arena.runner.n_suspended == 0


def test_dontneed_keeps_and_remove_drops_what_is_resident_and_what_is_swapped(rig: Rig) -> None:
    data = np.random.default_rng(2).bytes(64 * PAGE)
    rig.put(0, data)
    assert rig.pager.swapped
    rig.do("advise", rig.at(0), 64 * PAGE, MADV_DONTNEED)
    assert rig.get(0, 64 * PAGE) == data
    rig.do("advise", rig.at(8), 48 * PAGE, MADV_REMOVE)
    assert rig.get(0, 64 * PAGE) == data[: 8 * PAGE] + bytes(48 * PAGE) + data[56 * PAGE :]
    assert [call[2] for call in rig.pager.calls if call[0] == "removed"] == [False, True]


@pytest.mark.parametrize(("advice", "dropped"), [(MADV_REMOVE, True), (MADV_DONTNEED, False)])
def test_a_madvise_heard_of_in_the_middle_of_something_else_is_known_for_what_it_is(
    rig: Rig, advice: int, dropped: bool
) -> None:
    data = np.random.default_rng(2).bytes(64 * PAGE)
    rig.put(0, data)
    assert set(range(4, 12)) <= rig.pager.swapped
    rig.owner.begin("advise", rig.at(4), 8 * PAGE, advice)
    assert select.select([rig.mapper.uffd], [], [], 10)[0]
    rig.arena._machine.write_protect(WriteProtect(PageRun(40, 1)))  # an eviction meets the message, and reads it
    rig.until(lambda: bool(rig.pager.calls) and not rig.owner.is_busy())
    rig.owner.finish()
    assert [call[2] for call in rig.pager.calls if call[0] == "removed"] == [dropped]
    assert rig.get(4, 8 * PAGE) == (bytes(8 * PAGE) if dropped else data[4 * PAGE : 12 * PAGE])


def test_what_madvise_gives_up_is_noted_for_a_successor_before_its_word_is_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.put(0, np.random.default_rng(2).bytes(64 * PAGE))
    noted: list[object] = []

    def expect(runs: list[PageRun]) -> NDArray[np.int64]:
        noted.append((runs, rig.mapper.uffd.waits()))
        return np.arange(8, 56)

    def expect_no_more(expected: NDArray[np.int64], read: list[PageRun]) -> None:
        noted.append((len(expected), read, rig.mapper.uffd.waits()))

    monkeypatch.setattr(rig.pager, "expect_removal", expect)
    monkeypatch.setattr(rig.pager, "expect_no_more", expect_no_more)
    rig.do("advise", rig.at(0), 64 * PAGE, MADV_DONTNEED)
    assert noted == []
    rig.do("advise", rig.at(8), 48 * PAGE, MADV_REMOVE)
    run = PageRun(8, 48)
    assert noted == [([run], True), (48, [run], False)]


def test_unmapped_pages_are_freed_and_the_rest_goes_on(rig: Rig) -> None:
    rig.put(0, b"1" * 64 * PAGE)
    rig.do("unmap", rig.at(16), 48 * PAGE)
    rig.until(lambda: len(rig.pager.resident) + len(rig.pager.swapped) == 16)
    assert rig.arena.file_bytes <= 16 * PAGE
    assert rig.get(0, 16 * PAGE) == b"1" * 16 * PAGE
    assert rig.get(64, 1) == b"\0"


def test_moved_pages_are_found_where_they_went(rig: Rig) -> None:
    rig.put(0, b"2" * 64 * PAGE)
    target = rig.address + (1 << 38)
    rig.do("move", rig.at(8), 8 * PAGE, target)
    assert rig.do("get", target, 8 * PAGE) == b"2" * 8 * PAGE
    assert rig.get(0, 8 * PAGE) == b"2" * 8 * PAGE
    assert rig.get(16, PAGE) == b"2" * PAGE
    assert rig.pager.calls == [], "nothing was given up"


def test_pages_that_swap_lost_raise_a_bus_error(rig: Rig) -> None:
    rig.put(0, b"3" * 64 * PAGE)
    page = next(iter(rig.pager.swapped))
    with open("/dev/null", "r+b") as nothing:  # reads end at once, writes are taken
        os.dup2(nothing.fileno(), rig.swap.fileno())
    rig.owner.begin("get", rig.at(page), 1)
    rig.until(lambda: page in rig.pager.lost)
    _, status = os.waitpid(rig.owner.pid, 0)
    rig.owner.pid = 0
    assert os.WTERMSIG(status) == signal.SIGBUS


def test_a_worker_is_served_and_keeps_nothing_alive(rig: Rig) -> None:
    rig.put(0, b"owner")
    with Owner() as worker:
        number, _ = worker.do("map_paged_at", rig.arena.parts.frames.fd, rig.address, N_PAGES * PAGE)
        process = PidFd.open(worker.pid)
        place = Placed(0, N_PAGES, rig.address)
        rig.arena.map(PagingUffd(process.take_fd(number)), place, process, worker=True)
        worker.begin("get", rig.at(0), 5)
        rig.until(lambda: not worker.is_busy())
        assert worker.finish() == b"owner"
        rig.owner.kill()
        rig.until(lambda: len(rig.arena.mappers) == 1)
        assert rig.arena.file_bytes == 0, "the worker maps it, and nobody wants it"
        assert not rig.arena.in_use


def test_without_privilege_faults_are_served(tmp_path: Path) -> None:
    file = memfd.create("frames", N_PAGES * PAGE)
    with Owner(lambda: os.setresuid(NOBODY, NOBODY, NOBODY)) as owner:
        rig = Rig(tmp_path, owner, file)
        data = np.random.default_rng(4).bytes(64 * PAGE)
        rig.put(0, data)
        assert rig.get(0, 64 * PAGE) == data


def test_a_child_that_did_not_map_it_has_no_arena(rig: Rig) -> None:
    rig.put(0, b"before")
    rig.owner.begin("fork_and_touch", rig.at(0), b"child!", rig.at(1))
    rig.until(lambda: not rig.owner.is_busy())
    with pytest.raises(AssertionError):  # the child died of its touch before it could say anything
        rig.owner.finish()
    assert rig.get(0, 6) == b"before"
    assert len(rig.arena.mappers) == 1


def test_a_killed_process_leaves_nothing(rig: Rig) -> None:
    rig.put(0, b"4" * 64 * PAGE)
    n_before = len(os.listdir("/proc/self/fd"))
    rig.owner.kill()
    rig.until(lambda: not rig.arena.mappers)
    assert rig.pager.resident == {}
    assert rig.pager.swapped == set()
    assert rig.arena.file_bytes == 0
    assert len(os.listdir("/proc/self/fd")) == n_before - 3, "userfaultfd, its info, and pidfd"


def test_an_arena_given_up_lives_until_its_last_process_ends(rig: Rig) -> None:
    rig.put(0, b"5")
    rig.arena.give_up()
    assert rig.get(0, 1) == b"5"
    rig.owner.kill()
    rig.until(lambda: not rig.arenas.all)


def test_a_process_that_calls_exec_is_a_process_that_ended(rig: Rig) -> None:
    rig.put(0, b"6")
    rig.owner.begin("execute", "/bin/sleep", "100")
    rig.until(lambda: not rig.arena.mappers)
    assert rig.arena.file_bytes == 0
    rig.owner.kill()


def test_a_process_that_no_successor_could_be_told_of_is_not_served(rig: Rig, tmp_path: Path) -> None:
    store, n = rig.arena.parts.store, 100
    with (tmp_path / "anything").open("wb") as anything:
        while store.put_mapper(MapperEntry(n, [(0, 1, PAGE)], worker=False, pid=1), [anything.fileno()] * 2):
            n += 1
    address, number = rig.owner.do("map_paged", rig.arena.parts.frames.fd, N_PAGES * PAGE)[:2]
    process = PidFd.open(rig.owner.pid)
    uffd = PagingUffd(process.take_fd(number))
    with pytest.raises(OSError, match="no room for one more process"):
        rig.arena.map(uffd, Placed(0, N_PAGES, address), process, worker=False)
    assert rig.arena.mappers == [rig.mapper]
    rig.put(3, b"served as before")
    uffd.close()
    process.close()
