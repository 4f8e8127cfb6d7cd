"""Memory on devices: private pages move there and back, and what CPUs reach is mapped like a file."""

from __future__ import annotations

import pytest
from hosts import PAGE, Listener, frames_of, host_of, run

from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.space import Reason
from nopin.model.host.device_memory import DeviceMemory
from nopin.model.host.errors import NoMemory, NotSupported
from nopin.model.host.fault import fault_pages, lookup, lookup_own
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.host.vma import Prot

N_FRAMES = 16


def on_device(n_device_frames: int = 4) -> tuple[Host, Process, int, Listener, DeviceMemory]:
    """Make a process with two pages, a and b, and move them to a device."""
    host = host_of(N_FRAMES)
    memory = host.add_device_memory("gpu", n_device_frames, private=True)
    process = host.spawn_process()
    va = run(host, process.mmap(2))
    run(host, process.store(va, b"a" * PAGE + b"b" * PAGE))
    assert run(host, host.migrate(process, [va // PAGE, va // PAGE + 1], to=memory)) == min(2, n_device_frames)
    return host, process, va, Listener(process, va // PAGE), memory


def test_pages_on_a_device_are_its_own_and_free_the_hosts_frames() -> None:
    host, process, va, listener, memory = on_device()
    assert host.frames.n_free == N_FRAMES - 1
    entry = lookup_own(process, va // PAGE, memory)
    assert entry is not None
    assert entry.frame in memory.pool
    assert host.frames.read(entry.frame, 0, 1) == b"a"
    assert lookup(process, va // PAGE) is None
    come = run(host, fault_pages(process, va // PAGE, 2, write=True, memory=memory))
    assert come == FaultPages(2)
    assert listener.take() == [], "they stay where they are"
    host.check()


@pytest.mark.parametrize("who", ["cpu", "another device", "pin"])
def test_who_else_touches_them_has_them_moved_back(who: str) -> None:
    host, process, va, listener, memory = on_device()
    entry = lookup_own(process, va // PAGE, memory)
    assert entry is not None
    host.frames.write(entry.frame, 0, b"G")
    if who == "cpu":
        assert run(host, process.load(va, 2)) == b"Ga"
    elif who == "pin":
        process.unpin(run(host, process.pin(va, PAGE, write=False)))
    else:
        other = host.add_device_memory("nic", 1, private=True)
        assert run(host, fault_pages(process, va // PAGE, 1, write=False, memory=other)) == FaultPages(1)
    assert listener.take() == [(Cause.MIGRATE, ((0, 1),))]
    assert run(host, process.load(va, 2)) == b"Ga"
    assert memory.pool.n_free == 3
    assert lookup_own(process, va // PAGE + 1, memory) is not None, "the neighbour stays"
    host.check()


def test_a_full_device_takes_what_fits() -> None:
    host, process, va, _, _ = on_device(n_device_frames=1)
    assert frames_of(process, va, 2)[1] is not None
    assert run(host, process.load(va, 2 * PAGE)) == b"a" * PAGE + b"b" * PAGE
    host.check()


def test_shared_pages_do_not_go_to_a_device() -> None:
    host = host_of(N_FRAMES)
    memory = host.add_device_memory("gpu", 4, private=True)
    process = host.spawn_process()
    va = run(host, process.mmap(1))
    run(host, process.store(va, b"a"))
    child = run(host, process.fork())
    assert run(host, host.migrate(process, [va // PAGE], to=memory)) == 0
    assert run(host, child.load(va, 1)) == b"a"
    host.check()


@pytest.mark.parametrize("what", ["fork", "unmap", "move", "no rights", "exit"])
def test_pages_on_a_device_meet_events_like_any_other(what: str) -> None:
    host, process, va, _, memory = on_device()
    if what == "fork":
        child = run(host, process.fork())
        assert lookup_own(child, va // PAGE, memory) is not None
        run(host, child.store(va, b"c"))
        assert run(host, child.load(va, 2)) == b"ca"
    elif what == "unmap":
        run(host, process.munmap(va + PAGE, PAGE))
        assert memory.pool.n_free == 3
    elif what == "move":
        target = run(host, process.mremap(va, 2 * PAGE, 2 * PAGE, to=va + 64 * PAGE))
        assert lookup_own(process, target // PAGE, memory) is not None
        va = target
    elif what == "no rights":
        run(host, process.mprotect(va, PAGE, Prot.NONE))
        assert lookup_own(process, va // PAGE, memory) is None
        run(host, process.mprotect(va, PAGE, Prot.READ))
        come = run(host, fault_pages(process, va // PAGE, 1, write=False, memory=memory))
        assert come == FaultPages(1)
        assert lookup_own(process, va // PAGE, memory) is not None
    else:
        run(host, process.exit())
        assert memory.pool.n_free == 4
    if process.alive:
        assert run(host, process.load(va, 2)) == b"aa"
    host.check()


def test_without_room_on_the_host_a_page_stays_on_its_device() -> None:
    host = host_of(2, n_swap_slots=0)
    memory = host.add_device_memory("gpu", 1, private=True)
    process = host.spawn_process()
    va = run(host, process.mmap(2))
    run(host, process.store(va, b"a"))
    assert run(host, host.migrate(process, [va // PAGE], to=memory)) == 1
    run(host, process.store(va + PAGE, b"b"))
    with pytest.raises(NoMemory):
        run(host, process.load(va, 1))
    assert run(host, fault_pages(process, va // PAGE, 1, write=False)) == FaultPages(0, Reason.BUSY)
    run(host, process.munmap(va + PAGE, PAGE))
    assert run(host, process.load(va, 1)) == b"a"
    host.check()


def test_memory_that_cpus_reach_is_mapped_moved_and_revoked_like_a_file() -> None:
    host = host_of(N_FRAMES)
    memory = host.add_device_memory("bar", 4, private=False)
    window = host.new_file("bar0", 2 * PAGE, memory=memory)
    process, peer = host.spawn_process(), host.spawn_process()
    va = run(host, process.mmap(2, shared=True, file=window))
    there = run(host, peer.mmap(2, shared=True, file=window))
    listener = Listener(process, va // PAGE)
    run(host, process.store(va, b"bus"))
    assert run(host, peer.load(there, 3)) == b"bus"
    assert frames_of(process, va, 1)[0] in range(memory.pool.first, memory.pool.end)
    with pytest.raises(NotSupported):
        run(host, process.pin(va, PAGE, write=True))
    assert run(host, host.reclaim(4)) == 0
    assert run(host, host.migrate(process, [va // PAGE])) == 1
    assert listener.take() == [(Cause.MIGRATE, ((0, 1),))]
    assert memory.pool.n_free == 4
    assert run(host, peer.load(there, 3)) == b"bus"
    assert run(host, host.migrate(process, [va // PAGE], to=memory)) == 1
    listener.take()
    run(host, host.punch(window, 0, 1))
    assert listener.take() == [(Cause.TRUNCATE, ((0, 1),))]
    assert run(host, process.load(va, 3)) == bytes(3)
    host.check()
