"""Files of modelled hosts: shared and private mappings, writeback, truncation, holes, reclaim."""

from __future__ import annotations

from typing import Any

import pytest
from hosts import PAGE, Listener, frames_of, host_of, run

from nopin.iommu.mirror import Mirror
from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.effects import PageRun
from nopin.mm.space import Reason
from nopin.model.device.faults import ProcessFaults
from nopin.model.device.translations import Translations
from nopin.model.host.advice import Advice
from nopin.model.host.errors import Bus, NotSupported, PageLost
from nopin.model.host.fault import fault_pages
from nopin.model.host.files import File
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.host.vma import Prot

TEXT = b"a" * PAGE + b"b" * PAGE + b"c" * PAGE


def mapped(*, shared: bool = True, **settings: Any) -> tuple[Host, File, Process, int, Listener]:
    """Map a file of three pages, of a, b and c."""
    host = host_of(**settings)
    file = host.new_file("f", 3 * PAGE, TEXT)
    process = host.spawn_process()
    va = run(host, process.mmap(3, shared=shared, file=file))
    return host, file, process, va, Listener(process, va // PAGE)


def on_medium(file: File) -> bytes:
    return b"".join(file.stored.get(index, bytes(PAGE)) for index in range(3))


def test_mappings_of_a_file_show_its_bytes_and_share_its_pages() -> None:
    host, file, process, va, listener = mapped()
    other = host.spawn_process()
    there = run(host, other.mmap(2, shared=True, file=file, offset=1))
    run(host, process.store(va + PAGE, b"B"))
    assert run(host, other.load(there, 2 * PAGE)) == b"B" + TEXT[PAGE + 1 :]
    assert frames_of(process, va, 2)[1] == frames_of(other, there, 1)[0]
    assert (host.file_medium.n_read, listener.take()) == (2, [])
    host.check()


def test_a_private_mapping_copies_what_it_writes() -> None:
    host, file, process, va, listener = mapped(shared=False)
    run(host, process.load(va, 3 * PAGE))
    run(host, process.store(va, b"A"))
    run(host, process.store(va + PAGE, b"B"))
    assert listener.take() == [(Cause.COW, ((0, 1),)), (Cause.COW, ((1, 1),))]
    shared = host.spawn_process()
    there = run(host, shared.mmap(3, shared=True, file=file))
    assert run(host, shared.load(there, 3 * PAGE)) == TEXT
    run(host, shared.store(there, b"xyz"))
    assert run(host, process.load(va, 3)) == b"Aaa"
    run(host, process.madvise(va, PAGE, Advice.DONTNEED))
    assert run(host, process.load(va, 3)) == b"xyz", "the file's bytes again"
    host.check()


def test_a_private_first_store_copies_without_a_notifier() -> None:
    host, file, process, va, listener = mapped(shared=False)
    run(host, process.store(va, b"A"))
    assert listener.take() == []
    assert host.frames.read(file.cache[0].frame, 0, 2) == b"aa"
    host.check()


def test_accesses_past_the_end_are_a_bus_error() -> None:
    host, file, process, va, _ = mapped()
    longer = run(host, process.mmap(5, shared=True, file=file))
    with pytest.raises(Bus):
        run(host, process.load(longer + 3 * PAGE, 1))
    assert run(host, fault_pages(process, longer // PAGE, 5, write=True)) == FaultPages(3, Reason.NO_ACCESS)
    run(host, host.truncate(file, 4 * PAGE))
    assert run(host, process.load(longer, 4 * PAGE)) == TEXT + bytes(PAGE)
    del va


def test_writeback_writes_what_was_stored_and_hears_the_next_store() -> None:
    host, file, process, va, listener = mapped()
    run(host, process.store(va, b"A"))
    run(host, process.load(va + PAGE, 1))
    assert run(host, host.writeback(file)) == 1
    assert listener.take() == [(Cause.SYNC, ((0, 2),))]
    assert on_medium(file) == b"A" + TEXT[1:]
    assert run(host, host.writeback(file)) == 0
    run(host, process.store(va, b"!"))
    assert run(host, host.writeback(file)) == 1
    assert on_medium(file) == b"!" + TEXT[1:]
    host.check()


def test_what_a_device_wrote_after_a_writeback_is_written_by_the_next() -> None:
    host, file, process, va, _ = mapped()
    translations = Translations(host.frames)
    mirror = Mirror(process.notifiers, ProcessFaults(process, translations), 1 << 30)
    first = va // PAGE
    run(host, mirror.fill(PageRun(first, 1), write=True))
    run(host, host.writeback(file))
    assert mirror.use(first, 1, write=True), "it keeps the right to write"
    [frame] = frames_of(process, va, 1)
    assert frame is not None
    host.frames.write(frame, 0, b"device")
    assert run(host, host.writeback(file)) == 1
    assert on_medium(file)[:6] == b"device"
    host.frames.write(frame, 0, b"again!")
    assert mirror.use(first, 1, write=True)
    run(host, process.munmap(va, 3 * PAGE))
    assert run(host, host.writeback(file)) == 1
    assert on_medium(file)[:6] == b"again!"
    host.check()


def test_a_device_that_wrote_is_heard_when_its_process_exits() -> None:
    host, file, process, va, _ = mapped()
    mirror = Mirror(process.notifiers, ProcessFaults(process, Translations(host.frames)), 1 << 30)
    run(host, mirror.fill(PageRun(va // PAGE, 1), write=True))
    run(host, host.writeback(file))
    assert mirror.use(va // PAGE, 1, write=True)
    host.frames.write(file.cache[0].frame, 0, b"device")
    run(host, process.exit())
    assert run(host, host.writeback(file)) == 1
    assert on_medium(file)[:6] == b"device"


def test_a_failed_write_is_tried_again_and_a_failed_read_is_said_so() -> None:
    failing = ["file write"]
    host, file, process, va, _ = mapped(fires=lambda site: site in failing)
    run(host, process.store(va, b"A"))
    assert run(host, host.writeback(file)) == 0
    failing[:] = ["file read"]
    with pytest.raises(PageLost):
        run(host, process.load(va + PAGE, 1))
    failing[:] = []
    assert run(host, host.writeback(file)) == 1
    assert run(host, process.load(va, 3 * PAGE)) == b"A" + TEXT[1:]
    host.check()


def test_truncation_takes_pages_and_private_copies_away_and_clears_the_tail() -> None:
    host, file, process, va, listener = mapped()
    private = host.spawn_process()
    there = run(host, private.mmap(3, file=file))
    other = Listener(private, there // PAGE)
    run(host, process.load(va, 3 * PAGE))
    run(host, private.store(there + 2 * PAGE, b"mine"))
    run(host, host.truncate(file, PAGE + 2))
    assert listener.take() == [(Cause.TRUNCATE, ((2, 1),))]
    assert other.take() == [(Cause.TRUNCATE, ((2, 1),))]
    for who, at in ((process, va), (private, there)):
        with pytest.raises(Bus):
            run(host, who.load(at + 2 * PAGE, 1))
    run(host, host.truncate(file, 3 * PAGE))
    assert run(host, process.load(va, 3 * PAGE)) == TEXT[: PAGE + 2] + bytes(2 * PAGE - 2)
    assert run(host, private.load(there + 2 * PAGE, 4)) == bytes(4)
    host.check()


def test_truncation_waits_for_devices_before_pages_are_freed() -> None:
    host, file, process, va, listener = mapped()
    run(host, process.load(va, 3 * PAGE))
    n_free = host.frames.n_free
    listener.slow = True
    task = host.scheduler.spawn("truncate", host.truncate(file, 0))
    host.scheduler.run()
    assert not task.ended
    assert host.frames.n_free == n_free
    listener.fences[0].signal()
    host.scheduler.run()
    assert host.frames.n_free == n_free + 3
    host.check()


def test_a_hole_is_zeros_for_all_and_private_copies_stay() -> None:
    host, file, process, va, listener = mapped()
    private = host.spawn_process()
    there = run(host, private.mmap(3, file=file))
    run(host, private.store(there + PAGE, b"mine"))
    run(host, process.load(va, 3 * PAGE))
    run(host, process.madvise(va + PAGE, PAGE, Advice.REMOVE))
    assert listener.take() == [(Cause.TRUNCATE, ((1, 1),))]
    assert run(host, process.load(va, 3 * PAGE)) == TEXT[:PAGE] + bytes(PAGE) + TEXT[2 * PAGE :]
    assert run(host, private.load(there + PAGE, 5)) == b"mineb"
    assert 1 not in file.stored
    with pytest.raises(NotSupported):
        run(host, private.madvise(there, PAGE, Advice.REMOVE))
    host.check()


def test_pages_of_files_are_written_and_dropped_under_pressure() -> None:
    host, file, process, va, listener = mapped()
    run(host, process.store(va, b"A"))
    run(host, process.load(va + PAGE, 1))
    n_free = host.frames.n_free
    assert run(host, host.reclaim(2)) == 2
    assert listener.take() == [(Cause.RECLAIM, ((0, 2),))]
    assert (host.frames.n_free, file.cache, host.swap.n_used) == (n_free + 2, {}, 0)
    assert host.file_medium.n_written == 1
    assert run(host, process.load(va, 3 * PAGE)) == b"A" + TEXT[1:]
    host.check()


def test_shared_anonymous_memory_is_shared_with_children_and_ends_with_its_last_mapping() -> None:
    host = host_of()
    parent = host.spawn_process()
    va = run(host, parent.mmap(2, shared=True))
    run(host, parent.store(va, b"one"))
    listener = Listener(parent)
    child = run(host, parent.fork())
    assert listener.take() == [], "nothing of it is copied"
    run(host, child.store(va, b"two"))
    assert run(host, parent.load(va, 3)) == b"two"
    run(host, host.reclaim(1))
    assert run(host, child.load(va, 3)) == b"two"
    run(host, child.exit())
    assert run(host, parent.load(va, 3)) == b"two"
    run(host, parent.munmap(va, 2 * PAGE))
    assert host.frames.in_use() == [host.zero_page.frame]
    host.check()


def test_pins_of_shared_pages_hold_the_file_s_own() -> None:
    host, file, process, va, _ = mapped()
    held = run(host, process.pin(va, PAGE, write=True))
    assert held.frame(va // PAGE) == file.cache[0].frame
    assert run(host, host.reclaim(3)) == 0
    process.unpin(held)
    host.check()


def test_a_read_only_mapping_of_a_file_is_not_written_by_anyone() -> None:
    host, file, process, va, _ = mapped()
    run(host, process.mprotect(va, 3 * PAGE, Prot.READ))
    assert run(host, fault_pages(process, va // PAGE, 1, write=True)) == FaultPages(0, Reason.NO_ACCESS)
    assert run(host, host.writeback(file)) == 0
