"""The three ways of a modelled NIC to memory: mirrored, walked by PASID, pinned. Same bytes; different hazards."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hosts import PAGE
from nics import two_ends
from test_nic_host import Exact

from nopin.model.choice import Drawn
from nopin.model.effects import Procedure, Work
from nopin.model.host.advice import Advice
from nopin.model.host.errors import OverMemlock
from nopin.model.host.vma import Prot
from nopin.model.machine import Machine
from nopin.model.net.client import connect
from nopin.nic.abi import Discipline, WcStatus, WrOpcode

OK = WcStatus.SUCCESS
BYTES = bytes(range(1, 251)) * 40

WAYS: dict[str, dict[str, Any]] = {
    "mirrored": {},
    "short-term": {"discipline": Discipline.SHORT_TERM},
    "walked": {"walk": True},
    "pinned": {"discipline": Discipline.PINNED},
}
NOT_PINNED = [name for name in WAYS if name != "pinned"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_WRITE, WrOpcode.SEND, WrOpcode.RDMA_READ])
def test_bytes_arrive_whatever_the_way(way: str, opcode: WrOpcode) -> None:
    two = two_ends(connection={"mtu": 1024}, **WAYS[way])
    two.run(two.a.process.store(two.a.va + 100, BYTES))
    if opcode is WrOpcode.RDMA_READ:
        two.b.send(opcode, 50, len(BYTES), two.a, 100)
    else:
        two.b.recv(50, len(BYTES))
        two.a.send(opcode, 100, len(BYTES), two.b, 50)
    a, b = two.statuses()
    assert set(a + b) == {OK}
    assert two.run(two.b.process.load(two.b.va + 50, len(BYTES))) == BYTES
    for end in (two.a, two.b):
        end.host.check()


@pytest.mark.parametrize("way", NOT_PINNED)
def test_a_write_breaks_sharing_with_a_child(way: str) -> None:
    two = two_ends(observer=Exact(), **WAYS[way])
    two.run(two.b.process.store(two.b.va, b"before"))
    child = two.run(two.b.process.fork())
    two.run(two.a.process.store(two.a.va, b"after!"))
    two.a.send(WrOpcode.RDMA_WRITE, 0, 6, two.b)
    assert two.statuses() == ([OK], [])
    assert two.run(two.b.process.load(two.b.va, 6)) == b"after!"
    assert two.run(child.load(two.b.va, 6)) == b"before"


@pytest.mark.parametrize("way", NOT_PINNED)
def test_memory_mapped_anew_at_an_address_is_what_the_peer_reaches(way: str) -> None:
    two = two_ends(observer=Exact(), **WAYS[way])
    two.run(two.a.process.store(two.a.va, b"bytes"))
    two.a.send(WrOpcode.RDMA_WRITE, 0, 5, two.b)
    assert two.statuses() == ([OK], [])
    two.run(two.b.process.munmap(two.b.va, PAGE))
    two.run(two.b.process.mmap(1, at=two.b.va))
    two.a.send(WrOpcode.RDMA_READ, PAGE, 5, two.b)
    assert two.statuses() == ([OK], [])
    assert two.run(two.a.process.load(two.a.va + PAGE, 5)) == bytes(5)


def test_a_pinned_region_goes_on_with_the_old_pages() -> None:
    """The hazard that nothing is pinned for here: silent, and only the observer would know."""
    two = two_ends(**WAYS["pinned"])
    two.run(two.b.process.store(two.b.va, b"old"))
    two.run(two.b.process.munmap(two.b.va, PAGE))
    two.run(two.b.process.mmap(1, at=two.b.va))
    two.run(two.b.process.store(two.b.va, b"new"))
    two.a.send(WrOpcode.RDMA_READ, 0, 3, two.b)
    assert two.statuses() == ([OK], [])
    assert two.run(two.a.process.load(two.a.va, 3)) == b"old"


def test_deregistering_lets_go_of_pinned_pages() -> None:
    two = two_ends(**WAYS["pinned"])
    n_free = two.b.host.frames.n_free
    two.run(two.b.process.munmap(two.b.va, 8 * PAGE))
    assert two.b.host.frames.n_free == n_free, "pages of nobody, held for the device"
    for _ in range(2):
        two.b.nic_host.deregister(two.b.region)
    assert two.b.host.frames.n_free == n_free + 8
    two.a.send(WrOpcode.RDMA_WRITE, 0, 8, two.b)
    assert two.statuses() == ([WcStatus.REM_ACCESS_ERR], [])


def test_pinning_more_than_the_limit_registers_nothing() -> None:
    machine = Machine()
    process = machine.host("host").spawn_process()
    process.memlock_limit_bytes = 2 * PAGE
    va = machine.run(process.mmap(4))
    nic = machine.nic("nic")
    with pytest.raises(OverMemlock):
        machine.run(nic.register_pinned(process, va, 3 * PAGE))
    assert not process.pinned


def test_pinning_costs_time_for_each_page_and_registering_without_it_none() -> None:
    machine = Machine(preset="connectib56")
    process = machine.host("host").spawn_process()
    va = machine.run(process.mmap(64))
    nic = machine.nic("nic")
    nic.register(process, va, 64 * PAGE)
    assert machine.now_us == 0
    machine.run(nic.register_pinned(process, va, 64 * PAGE))
    assert machine.now_us == 16 + 64 * 0.25


@pytest.mark.parametrize("way", NOT_PINNED)
@pytest.mark.parametrize("trouble", ["hole", "protected", "dead"])
def test_bad_memory_is_an_exact_error(way: str, trouble: str) -> None:
    two = two_ends(**WAYS[way])
    if trouble == "hole":
        two.run(two.b.process.munmap(two.b.va + PAGE, PAGE))
    elif trouble == "protected":
        two.run(two.b.process.mprotect(two.b.va + PAGE, PAGE, Prot.READ))
    else:
        two.run(two.b.process.exit())
    two.a.send(WrOpcode.RDMA_WRITE, 0, 2 * PAGE, two.b)
    assert two.statuses() == ([WcStatus.REM_ACCESS_ERR], [])


def test_a_page_that_its_file_does_not_have_is_asked_for_once() -> None:
    two = two_ends(n_pages=2, walk=True)
    space = two.b.nic_host.memory._walked[two.b.process][1]
    space._hopeless.add((two.b.va >> 12, True))  # as a fault leaves it that ended in SIGBUS
    two.a.send(WrOpcode.RDMA_WRITE, 0, 8, two.b)
    assert two.statuses() == ([WcStatus.REM_ACCESS_ERR], [])
    assert not space._hopeless, "the next access asks anew"


@pytest.mark.parametrize("way", NOT_PINNED)
@pytest.mark.parametrize("seed", range(6))
def test_no_stale_byte_in_any_order(way: str, seed: int) -> None:
    observer = Exact()
    two = two_ends(chooser=Drawn(Random(seed)), connection={"mtu": 1024}, observer=observer, **WAYS[way])
    two.run(two.a.process.store(two.a.va, BYTES[: 2 * PAGE]))

    def sends() -> Procedure[None]:
        for _ in range(4):
            two.a.send(WrOpcode.RDMA_WRITE, 0, 2 * PAGE, two.b)
            assert (yield from two.a.client.completions()) == [(0, OK)]

    def disturbs() -> Procedure[None]:
        for number in range(4):
            yield Work("wait")
            yield from two.b.process.madvise(two.b.va + number % 2 * PAGE, PAGE, Advice.DONTNEED)
            child = yield from two.b.process.fork()
            yield from child.exit()

    two.scheduler.spawn("disturbs", disturbs())
    two.run(sends())
    two.a.send(WrOpcode.RDMA_WRITE, 0, 2 * PAGE, two.b)
    two.run(two.a.client.completions())
    assert two.run(two.b.process.load(two.b.va, 2 * PAGE)) == BYTES[: 2 * PAGE]
    assert observer.n_touched
    two.b.host.check()


def test_faults_of_a_walked_table_take_the_stages_of_the_device() -> None:
    machine = Machine(preset="pri_iommu")
    process = machine.host("host").spawn_process()
    va = machine.run(process.mmap(4))
    nic = machine.nic("nic")
    region = nic.register(process, va, 4 * PAGE, walk=True)
    machine.run(process.store(va + 2 * PAGE, bytes(2 * PAGE)))
    ours, theirs = nic.client(), nic.client()
    connect(ours.client, theirs.client, mtu=machine.mtu)
    ours.post_send(WrOpcode.RDMA_WRITE, [(va, 2 * PAGE, region.lkey)], remote=va + 2 * PAGE, rkey=region.rkey)
    assert machine.run(ours.completions()) == [(0, OK)]
    assert machine.costs is not None
    assert machine.costs.pages_per_fault_request == 1
    assert len(machine.services["nic"].total_ns) == 2
    assert machine.scheduler.now_ns == 2 * machine.costs.fault_service_ns(1)
