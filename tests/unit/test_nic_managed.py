"""RDMA on managed memory: queue pairs over arenas whose pages leave and come back while they work."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nopin.mm.causes import Cause
from nopin.mm.effects import ReadSwap
from nopin.nic.abi import WcStatus, WrOpcode
from nopin.nic.qp import QueuePair
from nopin.ranges import Range
from nopin.testing.paged_arena import PagedArena, run_through
from nopin.testing.pair import Pair, Side, Wire, connect, make_side
from nopin.units import PAGE_BYTES as PAGE

N_PAGES = 64
LENGTH = N_PAGES * PAGE


def managed(name: str, seed: int, *, of: Side | None = None) -> tuple[Side, PagedArena]:
    """One end whose memory is all one arena, filled with random bytes and swapped out."""
    nic, iommu = (of.nic, of.iommu) if of is not None else (None, None)
    side = make_side(name, seed=seed, n_pages=N_PAGES, nic=nic, iommu=iommu)
    arena = PagedArena(N_PAGES)
    arena.store(0, np.random.default_rng(seed).integers(0, 256, LENGTH, np.uint8).tobytes())
    arena.evict_now()
    side.iommu.attach(arena.device)
    start = side.region.start
    side.iommu.map_window(side.region.pasid, Range(start, start + LENGTH), arena.device, 0)
    side.space.hole = set(range(N_PAGES))  # nothing may reach it the plain way
    return side, arena


class Ends:
    """Two managed ends, on two devices (the wire) or on one (the direct path)."""

    def __init__(self, *, direct: bool, wire: Wire | None = None) -> None:
        self.a, self.here = managed("10.0.0.1", 1)
        self.b, self.there = managed("10.0.0.1" if direct else "10.0.0.2", 2, of=self.a if direct else None)
        connect(self.a, self.b)
        self.pair = Pair(self.a, self.b, wire)


@pytest.fixture(params=[False, True], ids=["wire", "direct"])
def ends(request: pytest.FixtureRequest) -> Ends:
    return Ends(direct=request.param)


def statuses(side: Side) -> list[WcStatus]:
    return [status for _, status in side.poll()]


def part(arena: PagedArena, at: int, length: int) -> bytes:
    return arena.contents()[at : at + length]


def test_reads_and_writes_of_memory_that_is_out_bring_and_save_every_byte(ends: Ends) -> None:
    n = 20 * PAGE + 77
    theirs, ours = part(ends.there, 5, n), part(ends.here, 30 * PAGE, n)
    ends.a.post(WrOpcode.RDMA_READ, 3, n, to=ends.b.region, at=5)
    ends.a.post(WrOpcode.RDMA_WRITE, 30 * PAGE, n, to=ends.b.region, at=40 * PAGE + 9)
    ends.pair.run()
    assert statuses(ends.a) == [WcStatus.SUCCESS] * 2
    ends.here.evict_now()
    ends.there.evict_now()
    assert part(ends.here, 3, n) == theirs
    assert part(ends.there, 40 * PAGE + 9, n) == ours
    assert not ends.here.held
    assert not ends.there.held
    assert ends.b.region.meter.page_faults > 0


def test_what_is_resident_raises_no_fault_and_does_not_park(ends: Ends) -> None:
    for _ in range(2):
        ends.a.post(WrOpcode.RDMA_READ, 0, 8 * PAGE, to=ends.b.region)
        ends.pair.run()
        n_faults, n_parked = ends.there.n_faults, ends.a.nic.counters.parked + ends.b.nic.counters.parked
    ends.a.post(WrOpcode.RDMA_READ, 0, 8 * PAGE, to=ends.b.region)
    ends.pair.run()
    assert ends.there.n_faults == n_faults
    assert ends.a.nic.counters.parked + ends.b.nic.counters.parked == n_parked


def test_send_and_receive_scatter_into_managed_memory(ends: Ends) -> None:
    ends.b.post_recv(10 * PAGE + 50, 9000)
    message = part(ends.here, 60, 9000)
    ends.a.post(WrOpcode.SEND, 60, 9000)
    ends.pair.run()
    assert statuses(ends.b) == [WcStatus.SUCCESS]
    ends.there.evict_now()
    assert part(ends.there, 10 * PAGE + 50, 9000) == message


def test_an_atomic_on_a_page_that_is_only_readable_asks_for_more_and_is_done_once(ends: Ends) -> None:
    ends.a.post(WrOpcode.RDMA_READ, 8192, 8, to=ends.b.region, at=16)
    ends.pair.run()
    before = int.from_bytes(part(ends.there, 16, 8), "little")
    ends.a.post(WrOpcode.ATOMIC_FETCH_AND_ADD, 0, 8, to=ends.b.region, at=16 + ends.b.region.iova % 8, compare_add=5)
    ends.pair.run()
    assert statuses(ends.a) == [WcStatus.SUCCESS] * 2
    ends.there.evict_now()
    assert int.from_bytes(part(ends.there, 16, 8), "little") == (before + 5) % 2**64
    assert int.from_bytes(part(ends.here, 0, 8), "little") == before


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.RDMA_WRITE])
def test_a_lost_page_at_the_peer_is_an_access_error_and_the_packets_before_it_arrive(
    ends: Ends, opcode: WrOpcode
) -> None:
    ends.there.lost = {3}
    theirs, ours = part(ends.there, 0, 3 * PAGE), part(ends.here, 0, 3 * PAGE)
    ends.a.post(opcode, 0, 5 * PAGE, to=ends.b.region)
    ends.pair.run()
    assert statuses(ends.a) == [WcStatus.REM_ACCESS_ERR]
    if opcode is WrOpcode.RDMA_READ:
        assert part(ends.here, 0, 3 * PAGE) == theirs
    else:
        assert part(ends.there, 0, 3 * PAGE) == ours
    assert not ends.here.held
    assert not ends.there.held


def test_a_lost_page_of_our_own_is_a_local_protection_error(ends: Ends) -> None:
    ends.here.lost = {2}
    ends.a.post(WrOpcode.RDMA_WRITE, PAGE, 3 * PAGE, to=ends.b.region)
    ends.pair.run()
    assert statuses(ends.a) == [WcStatus.LOC_PROT_ERR]


def test_a_storm_of_invalidations_delays_and_does_not_fail(ends: Ends) -> None:
    storm = ends.there.notifiers.invalidate_start([Range(0, N_PAGES)], Cause.UNMAP)
    ends.a.post(WrOpcode.RDMA_READ, 0, 100, to=ends.b.region, at=7)
    for _ in range(50):
        ends.pair._step()
    assert statuses(ends.a) == []
    storm.end()
    ends.pair.run()
    assert statuses(ends.a) == [WcStatus.SUCCESS]
    assert part(ends.here, 0, 100) == part(ends.there, 7, 100)


def second_queue_pair(ends: Ends) -> tuple[Side, Side]:
    """Connect two more queue pairs of the same two devices, over memory that is all there."""
    c = make_side("", seed=11, n_pages=N_PAGES, nic=ends.a.nic, iommu=ends.a.iommu)
    d = make_side("", seed=12, n_pages=N_PAGES, nic=ends.b.nic, iommu=ends.b.iommu)
    connect(c, d)
    return c, d


def test_a_read_of_a_page_that_is_out_parks_only_its_queue_pair(ends: Ends) -> None:
    c, d = second_queue_pair(ends)
    ends.a.answer_faults = ends.b.answer_faults = False
    ends.a.post(WrOpcode.RDMA_READ, 0, 2 * PAGE, to=ends.b.region, at=5 * PAGE)
    for k in range(20):
        c.post(WrOpcode.RDMA_READ, k * PAGE, PAGE, to=d.region, at=k * PAGE)
    for _ in range(200):
        ends.pair._step()
    assert statuses(c) == [WcStatus.SUCCESS] * 20
    assert statuses(ends.a) == []
    # Its fault is in the middle of waiting for the medium; it goes on once that has answered.
    requests = [side.iommu.take_requests() for side in (ends.a, ends.b)]
    assert requests == [[], []]
    faults = [
        fault for side in {id(s.iommu): s for s in (ends.a, ends.b)}.values() for fault in side.iommu.take_faults()
    ]
    assert faults
    assert any(isinstance(next(fault.procedure), ReadSwap) for fault in faults)
    c.post(WrOpcode.RDMA_READ, 0, PAGE, to=d.region)
    for _ in range(50):
        ends.pair._step()
    assert statuses(c) == [WcStatus.SUCCESS]
    for fault in faults:
        run_through(fault.procedure)
    ends.a.answer_faults = ends.b.answer_faults = True
    ends.pair.run()
    assert statuses(ends.a) == [WcStatus.SUCCESS]
    assert part(ends.here, 0, 2 * PAGE) == part(ends.there, 5 * PAGE, 2 * PAGE)


@pytest.mark.parametrize("direct", [False, True], ids=["wire", "direct"])
@pytest.mark.parametrize("seed", range(6))
def test_eviction_while_data_moves_loses_and_confuses_nothing(seed: int, *, direct: bool) -> None:
    """Pages of both ends leave at random moments; the oracle applies each work to two byte strings, in order."""
    rng = random.Random(seed)
    ends = Ends(direct=direct)
    here, there = bytearray(ends.here.contents()), bytearray(ends.there.contents())

    def evict_some() -> None:
        for arena in (ends.here, ends.there):
            arena.evict_now(*rng.sample(range(N_PAGES), rng.randrange(1, N_PAGES)))

    for _ in range(25):
        n = rng.choice([8, 100, PAGE, 3 * PAGE + 5, 12 * PAGE])
        ours, theirs = rng.randrange(LENGTH - n), rng.randrange(LENGTH - n)
        if rng.random() < 0.5:
            ends.a.post(WrOpcode.RDMA_READ, ours, n, to=ends.b.region, at=theirs)
            here[ours : ours + n] = there[theirs : theirs + n]
        else:
            ends.a.post(WrOpcode.RDMA_WRITE, ours, n, to=ends.b.region, at=theirs)
            there[theirs : theirs + n] = here[ours : ours + n]
        for _ in range(100_000):
            if rng.random() < 0.4:
                evict_some()
            if not ends.pair._step() and not ends.a.qp.send.works:
                break
            ends.pair.now += 10_000
            for side in (ends.a, ends.b):
                side.nic.on_deadline(ends.pair.now)
        assert statuses(ends.a) == [WcStatus.SUCCESS]
    evict_some()
    assert ends.here.contents() == bytes(here)
    assert ends.there.contents() == bytes(there)
    for arena in (ends.here, ends.there):
        arena.mirror.check()
        assert arena.notifiers.statistics().invalidations["reclaim"] > 10
        assert arena.n_faults > 10
    assert not ends.here.held
    assert not ends.there.held


def test_a_destroyed_queue_pair_lets_go_of_the_pages_it_waited_for(ends: Ends) -> None:
    ends.a.post(WrOpcode.RDMA_READ, 0, PAGE, to=ends.b.region)
    ends.a.answer_faults = ends.b.answer_faults = False
    for _ in range(50):
        ends.pair._step()
    for side in (ends.a, ends.b):
        qp: QueuePair = side.qp
        side.nic.destroy_qp(qp)
    ends.a.answer_faults = ends.b.answer_faults = True
    ends.pair.run()
    assert not ends.here.held
    assert not ends.there.held
