"""Anonymous memory of modelled processes: mapping, faults, the zero page, unmapping, the end."""

from __future__ import annotations

import pytest
from hosts import PAGE, Listener, host_of, run

from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.space import Reason
from nopin.model.host.errors import Killed, NoMemory, NotSupported, Segv
from nopin.model.host.fault import fault_pages, lookup
from nopin.model.host.frames import POISON, FrameObserver, Frames
from nopin.model.host.vma import Prot


def test_the_frame_that_was_given_back_last_is_handed_out_next_with_zeros() -> None:
    frames = Frames(4)
    taken = [frames.allocate() for _ in range(4)]
    assert taken == [0, 1, 2, 3]
    assert frames.allocate() is None
    frames.write(2, 8, b"old")
    frames.put(1)
    frames.put(2)
    assert frames.read(2, 0, 4) == bytes([POISON]) * 4
    assert frames.allocate() == 2
    assert frames.read(2, 0, PAGE) == bytes(PAGE)
    frames.get(2)
    frames.put(2)
    assert frames.n_references(2) == 1
    assert frames.n_free == 1


def test_frames_tell_when_one_is_taken_and_when_the_last_reference_goes() -> None:
    log: list[tuple[str, int]] = []

    class Log(FrameObserver):
        def allocated(self, frame: int) -> None:
            log.append(("allocated", frame))

        def freed(self, frame: int) -> None:
            log.append(("freed", frame))

    frames = Frames(2, Log())
    frame = frames.allocate()
    assert frame == 0
    frames.get(frame)
    frames.put(frame)
    assert log == [("allocated", 0)]
    frames.put(frame)
    assert log == [("allocated", 0), ("freed", 0)]


def test_a_run_of_512_frames_is_aligned_and_leaves_the_rest_to_single_pages() -> None:
    frames = Frames(1536)
    assert frames.allocate() == 0
    assert frames.allocate_run() == 512
    assert frames.allocate() == 1
    assert frames.allocate_run() == 1024
    assert frames.allocate_run() is None
    for frame in range(512, 1024):
        frames.put(frame)
    assert frames.allocate_run() == 512
    assert frames.n_free == 510


def test_untouched_memory_is_the_zero_page_until_it_is_written() -> None:
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(2))
    base, n_free = va // PAGE, host.frames.n_free
    listener = Listener(process, base)
    assert run(host, process.load(va, 2 * PAGE)) == bytes(2 * PAGE)
    entry = lookup(process, base)
    assert entry is not None
    assert entry.page is host.zero_page
    assert not entry.writable
    assert host.frames.n_free == n_free
    run(host, process.store(va + 100, b"hello"))
    assert listener.take() == [(Cause.COW, ((0, 1),))]
    assert run(host, process.load(va + 98, 8)) == b"\0\0hello\0"
    assert host.frames.read(host.zero_page.frame, 0, PAGE) == bytes(PAGE)
    assert host.frames.n_free == n_free - 1
    host.check()


def test_a_first_store_needs_no_notifier() -> None:
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(3))
    listener = Listener(process, va // PAGE)
    run(host, process.store(va + PAGE - 2, b"abcd"))
    assert run(host, process.load(va + PAGE - 3, 6)) == b"\0abcd\0"
    assert listener.take() == []


def test_an_access_outside_mappings_or_rights_is_a_segv() -> None:
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(1, prot=Prot.READ))
    for access in (process.store(va, b"x"), process.load(va + PAGE, 1), process.load(0, 1)):
        with pytest.raises(Segv):
            run(host, access)
    assert run(host, process.load(va, 1)) == b"\0"
    assert run(host, fault_pages(process, va // PAGE, 2, write=False)) == FaultPages(1, Reason.NO_ACCESS)
    assert run(host, fault_pages(process, va // PAGE, 2, write=True)) == FaultPages(0, Reason.NO_ACCESS)


def test_unmapping_tells_before_and_frees_after() -> None:
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(4))
    listener = Listener(process, va // PAGE)
    run(host, process.store(va, bytes(range(256)) * 64))
    n_free = host.frames.n_free
    listener.slow = True
    task = host.scheduler.spawn("munmap", process.munmap(va + PAGE, 2 * PAGE))
    host.scheduler.run()
    assert not task.ended, "frames of pages that a device still uses"
    assert host.frames.n_free == n_free
    assert lookup(process, va // PAGE + 1) is not None
    listener.fences[0].signal()
    assert host.scheduler.run()
    assert listener.take() == [(Cause.UNMAP, ((1, 2),))]
    assert host.frames.n_free == n_free + 2
    with pytest.raises(Segv):
        run(host, process.load(va + PAGE, 1))
    assert run(host, process.load(va + 3 * PAGE, 4)) == bytes(range(4))
    host.check()


def test_mapping_over_a_range_unmaps_it_and_reads_zeros() -> None:
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(3))
    listener = Listener(process, va // PAGE)
    run(host, process.store(va, b"a" * 3 * PAGE))
    assert run(host, process.mmap(1, at=va + PAGE)) == va + PAGE
    assert listener.take() == [(Cause.UNMAP, ((1, 1),))]
    assert run(host, process.load(va, 3 * PAGE)) == b"a" * PAGE + bytes(PAGE) + b"a" * PAGE


def test_gaps_are_used_lowest_first_and_wholly() -> None:
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(4))
    assert run(host, process.mmap(1)) == va + 4 * PAGE
    run(host, process.munmap(va + PAGE, 2 * PAGE))
    assert run(host, process.mmap(3)) == va + 5 * PAGE
    assert run(host, process.mmap(2)) == va + PAGE


@pytest.mark.parametrize("call", ["munmap", "mmap"])
def test_calls_that_make_no_sense_are_refused(call: str) -> None:
    host = host_of()
    process = host.spawn_process()
    with pytest.raises(NotSupported):
        run(host, process.munmap(5, PAGE) if call == "munmap" else process.mmap(0))


def test_exit_tells_devices_waits_for_them_and_gives_everything_back() -> None:
    host = host_of()
    n_free = host.frames.n_free
    process = host.spawn_process()
    va = run(host, process.mmap(3))
    run(host, process.store(va, b"x" * 3 * PAGE))
    listener = Listener(process)
    listener.slow = True
    task = host.scheduler.spawn("exit", process.exit())
    host.scheduler.run()
    assert [cause for cause, _ in listener.told] == [Cause.RELEASE]
    assert not task.ended
    assert host.frames.n_free == n_free - 3
    listener.fences[0].signal()
    assert host.scheduler.run()
    assert host.frames.n_free == n_free
    assert host.processes == {}
    with pytest.raises(Killed):
        run(host, process.load(va, 1))
    assert run(host, fault_pages(process, va // PAGE, 1, write=False)) == FaultPages(0, Reason.OWNER_GONE)


def test_memory_that_runs_out_is_said_so_and_a_device_is_told_to_try_again() -> None:
    host = host_of(3, n_swap_slots=0)
    process = host.spawn_process()
    va = run(host, process.mmap(3))
    with pytest.raises(NoMemory):
        run(host, process.store(va, b"x" * 3 * PAGE))
    assert run(host, process.load(va, 3 * PAGE)) == b"x" * 2 * PAGE + bytes(PAGE)
    assert run(host, fault_pages(process, va // PAGE, 3, write=True)) == FaultPages(2, Reason.BUSY)


def test_a_terabyte_costs_what_is_touched() -> None:
    host = host_of(1 << 28)
    process = host.spawn_process()
    va = run(host, process.mmap(1 << 28))
    for at in range(0, 1 << 40, 1 << 36):
        run(host, process.store(va + at, at.to_bytes(8, "little")))
    assert run(host, process.load(va + (5 << 36), 8)) == (5 << 36).to_bytes(8, "little")
    assert len(process.table) == 16
    run(host, process.munmap(va, 1 << 40))
    assert len(process.table) == 0
    host.check()
