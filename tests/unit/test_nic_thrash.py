"""Memory that never stays: every page a message needs is gone again each time somebody looks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nopin.mm.space import Absent
from nopin.nic.abi import Discipline, WcStatus, WrOpcode
from nopin.nic.mr import Region
from nopin.testing.pair import ALL_RIGHTS, Pair, Side, answer_faults, connect, make_pair, make_side, send_entry
from nopin.units import MS_NS, PAGE_BYTES

PATHS = ("wire", "direct")
DISCIPLINES = (Discipline.ON_DEMAND, Discipline.SHORT_TERM)
CASES = list(product(PATHS, DISCIPLINES))
LENGTH = 5 * PAGE_BYTES


def make(path: str, discipline: Discipline) -> tuple[Pair, Side, Side]:
    a = make_side("10.0.0.1", seed=1, discipline=discipline)
    on = {"nic": a.nic, "iommu": a.iommu} if path == "direct" else {}
    b = make_side("10.0.0.2", seed=2, discipline=discipline, **on)  # type: ignore[arg-type]  # two of its options
    connect(a, b)
    a.space.memory[:] = np.random.default_rng(1).integers(0, 256, len(a.space.memory), np.uint8)
    b.space.memory[:] = np.random.default_rng(2).integers(0, 256, len(b.space.memory), np.uint8)
    return Pair(a, b), a, b


def second_region(side: Side, discipline: Discipline) -> Region:
    """Another region over the same memory, by the same addresses."""
    return side.nic.register(
        side.qp.pd,
        pasid=side.region.pasid,
        address=side.space.base,
        length=len(side.space.memory),
        iova=side.space.base,
        access=ALL_RIGHTS,
        discipline=discipline,
    )


def scattered(side: Side, discipline: Discipline) -> list[tuple[int, int, int]]:
    """Entries over two regions: LENGTH bytes from page 0 on, then as many from page 100 on."""
    other = second_region(side, discipline)
    return [(side.region.iova, LENGTH, side.region.lkey), (other.iova + 100 * PAGE_BYTES, LENGTH, other.lkey)]


def let_nothing_stay(*sides: Side) -> None:
    for side in sides:
        side.space.fleeting = set(range(len(side.space.memory) // PAGE_BYTES))


def joined(side: Side) -> bytes:
    memory = side.space.memory
    return memory[:LENGTH].tobytes() + memory[100 * PAGE_BYTES : 100 * PAGE_BYTES + LENGTH].tobytes()


@pytest.mark.parametrize(("path", "discipline"), CASES)
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.SEND])
def test_messages_of_several_regions_get_through(path: str, discipline: Discipline, opcode: WrOpcode) -> None:
    pair, a, b = make(path, discipline)
    let_nothing_stay(a, b)
    ours, theirs = scattered(a, discipline), scattered(b, discipline)
    b.recvs.post([send_entry(WrOpcode.SEND, theirs)])
    remote = b.region.iova + 200 * PAGE_BYTES
    a.sends.post([send_entry(opcode, ours, remote=remote, rkey=b.region.rkey)])
    pair.run(limit_ns=10_000_000_000)
    assert a.poll() == [(0, WcStatus.SUCCESS)]
    there = joined(b) if opcode is WrOpcode.SEND else b.space.memory[200 * PAGE_BYTES :][: 2 * LENGTH].tobytes()
    assert there == joined(a)
    assert a.nic.counters.ack_timeout == 0


@pytest.mark.parametrize(("path", "discipline"), CASES)
def test_an_atomic_gets_through_once(path: str, discipline: Discipline) -> None:
    pair, a, b = make(path, discipline)
    let_nothing_stay(a, b)
    before = int.from_bytes(b.space.memory[:8].tobytes(), "little")
    a.post(WrOpcode.ATOMIC_FETCH_AND_ADD, 0, 8, to=b.region, compare_add=1)
    pair.run(limit_ns=10_000_000_000)
    assert a.poll() == [(0, WcStatus.SUCCESS)]
    assert int.from_bytes(a.space.memory[:8].tobytes(), "little") == before
    assert int.from_bytes(b.space.memory[:8].tobytes(), "little") == (before + 1) & (1 << 64) - 1


def test_every_piece_of_a_list_is_waited_for_before_any_is_copied() -> None:
    pair, a, b = make("direct", Discipline.ON_DEMAND)
    pieces = scattered(a, Discipline.ON_DEMAND)
    before = b.space.memory.copy()
    a.space.slow = {102}
    a.answer_faults = b.answer_faults = False
    a.sends.post([send_entry(WrOpcode.RDMA_WRITE, pieces, remote=b.region.iova, rkey=b.region.rkey)])
    pair.run(limit_ns=1_000_000)
    assert 102 in a.space.slow, "nobody but who answers page requests may bring a slow page"
    assert np.array_equal(b.space.memory, before)
    a.answer_faults = b.answer_faults = True
    pair.run()
    assert a.poll() == [(0, WcStatus.SUCCESS)]
    assert b.space.memory[: 2 * LENGTH].tobytes() == joined(a)


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ])
def test_a_page_held_back_anew_at_every_look_is_told_to_the_peer_within_the_bound(opcode: WrOpcode) -> None:
    pair, a, b = make("wire", Discipline.ON_DEMAND)

    def held_back(start: int, end: int, *, write: bool = False) -> Absent:
        return Absent(1, slow=True, held=True)

    b.space.absent = held_back  # type: ignore[method-assign]  # in place of a method
    b.answer_faults = False
    a.post(opcode, 0, 8, to=b.region)
    for _ in range(100):
        while pair._step():
            continue
        pair.now += 4 * MS_NS
        for side in (a, b):
            if side.nic.is_due(pair.now):
                side.nic.on_deadline(pair.now)
        answer_faults(b, pair.now)  # the page comes well within the bound, and is gone at once
    assert b.nic.counters.sent_rnr_nak >= 5
    assert a.nic.counters.ack_timeout == 0
    del b.space.absent
    b.answer_faults = True
    pair.run()
    assert a.poll() == [(0, WcStatus.SUCCESS)]


def test_a_queue_pair_that_ends_while_it_takes_held_answers_has_no_timer_left() -> None:
    """Found by exploring a READ against munmap: with its retries used up, the timer was due for ever."""
    pair = make_pair(retry_cnt=0)
    a, b = pair.a, pair.b
    a.answer_faults = False
    a.space.slow.add(0)
    a.post(WrOpcode.RDMA_READ, 0, 8, to=b.region)
    while pair._step():
        pass
    a.space.slow.clear()
    a.space.hole.add(0)
    answer_faults(a, pair.now)
    assert a.poll() == [(0, WcStatus.LOC_PROT_ERR)]
    assert a.nic.next_deadline() is None
