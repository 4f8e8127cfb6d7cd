"""Migration, merging, huge pages and exclusive access: bytes stay, frames change, devices hear what is so."""

from __future__ import annotations

from typing import Any

import pytest
from hosts import PAGE, Listener, frames_of, host_of, run

from nopin.mm.causes import Cause
from nopin.mm.subscriber import Answer, Invalidation, Veto
from nopin.model.host.advice import Advice
from nopin.model.host.errors import NotSupported
from nopin.model.host.exclusive import lookup_exclusive
from nopin.model.host.fault import lookup
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.host.vma import Prot
from nopin.ranges import Range

HUGE = 512


def filled(*letters: str, n_frames: int = 64, **settings: Any) -> tuple[Host, Process, int, Listener]:
    host = host_of(n_frames, **settings)
    process = host.spawn_process()
    va = run(host, process.mmap(len(letters)))
    run(host, process.store(va, b"".join(letter.encode() * PAGE for letter in letters)))
    return host, process, va, Listener(process, va // PAGE)


def first_bytes(host: Host, process: Process, va: int, n: int) -> bytes:
    return b"".join(run(host, process.load(va + at * PAGE, 1)) for at in range(n))


# Migration


def test_pages_move_with_their_bytes_and_rights_and_old_frames_are_free() -> None:
    host, process, va, listener = filled("a", "b", "c")
    run(host, process.mprotect(va + PAGE, PAGE, Prot.READ))
    listener.take()
    before, n_free = frames_of(process, va, 3), host.frames.n_free
    assert run(host, host.migrate(process, range(va // PAGE, va // PAGE + 2))) == 2
    assert listener.take() == [(Cause.MIGRATE, ((0, 2),))]
    after = frames_of(process, va, 3)
    assert after[2] == before[2]
    assert not set(after[:2]) & set(before[:2])
    assert host.frames.n_free == n_free
    assert first_bytes(host, process, va, 3) == b"abc"
    entry = lookup(process, va // PAGE + 1)
    assert entry is not None
    assert not entry.writable
    host.check()


def test_a_page_moves_in_all_processes_that_share_it() -> None:
    host, parent, va, listener = filled("a")
    child = run(host, parent.fork())
    listener.take()
    heard = Listener(child, va // PAGE)
    assert run(host, host.migrate(parent, [va // PAGE])) == 1
    assert listener.take() == heard.take() == [(Cause.MIGRATE, ((0, 1),))]
    assert frames_of(parent, va, 1) == frames_of(child, va, 1)
    run(host, child.store(va, b"c"))
    assert (run(host, parent.load(va, 1)), run(host, child.load(va, 1))) == (b"a", b"c")
    host.check()


def test_nobody_stores_to_the_new_frame_while_a_device_reads_the_old_one() -> None:
    host, process, va, listener = filled("a")
    before = frames_of(process, va, 1)
    listener.slow = True
    task = host.scheduler.spawn("migrate", host.migrate(process, [va // PAGE]))
    host.scheduler.run()
    store = host.scheduler.spawn("store", process.store(va, b"b"))
    host.scheduler.run()
    assert not task.ended
    assert not store.ended
    assert before[0] is not None
    assert host.frames.read(before[0], 0, 1) == b"a"
    listener.fences[0].signal()
    host.scheduler.run()
    assert (task.result, run(host, process.load(va, 2))) == (1, b"ba")
    host.check()


def test_pinned_refused_and_untouched_pages_stay_and_the_others_move() -> None:
    class Keeper(Listener):
        def invalidate_start(self, event: Invalidation) -> Answer:
            super().invalidate_start(event)
            return Veto(event.within(Range(self.page, self.page + 1))) if event.may_veto else None

        page = 0

    host, process, va, _ = filled("a", "b", "c")
    run(host, process.mremap(va, 3 * PAGE, 4 * PAGE))
    run(host, process.load(va + 3 * PAGE, 1))
    held = run(host, process.pin(va, PAGE, write=True))
    keeper = Keeper(process, veto_limit=1)
    keeper.page = va // PAGE + 1
    before = frames_of(process, va, 4)
    assert run(host, host.migrate(process, range(va // PAGE, va // PAGE + 4))) == 1
    changed = [old != new for old, new in zip(before, frames_of(process, va, 4), strict=True)]
    assert changed == [False, False, True, False]
    assert first_bytes(host, process, va, 4) == b"abc\0"
    process.unpin(held)
    host.check()


def test_pages_of_files_move_too() -> None:
    host = host_of()
    file = host.new_file("f", PAGE, b"text")
    process = host.spawn_process()
    va = run(host, process.mmap(1, shared=True, file=file))
    run(host, process.store(va, b"T"))
    before = file.cache[0].frame
    assert run(host, host.migrate(process, [va // PAGE])) == 1
    assert file.cache[0].frame != before
    assert run(host, host.writeback(file)) == 1
    assert file.stored[0][:4] == b"Text"
    host.check()


def test_an_owner_does_not_hear_of_its_own_migration() -> None:
    host, process, va, listener = filled("a")
    device = object()
    heard = Own(process)
    process.notifiers.subscribe(Range(0, 1 << 52), heard, owner=device)
    run(host, host.migrate(process, [va // PAGE], owner=device))
    assert (len(listener.take()), heard.n_heard) == (1, 0)
    run(host, host.migrate(process, [va // PAGE]))
    assert heard.n_heard == 1


class Own(Listener):
    """Counts what it hears, subscribed by the test."""

    def __init__(self, process: Process) -> None:
        del process
        self.n_heard = 0

    def invalidate_start(self, event: Invalidation) -> Answer:
        self.n_heard += 1
        return None

    def invalidate_end(self, event: Invalidation) -> None:
        """Not counted."""


# Merging


def test_pages_with_the_same_bytes_become_one_until_somebody_writes() -> None:
    host, process, va, listener = filled("a", "b", "a")
    other = host.spawn_process()
    there = run(host, other.mmap(1))
    run(host, other.store(there, b"a" * PAGE))
    heard = Listener(other, there // PAGE)
    for who, at, n in ((process, va, 3), (other, there, 1)):
        run(host, who.madvise(at, n * PAGE, Advice.MERGEABLE))
    n_free = host.frames.n_free
    assert run(host, host.merge_identical()) == 2
    assert host.frames.n_free == n_free + 2
    assert frames_of(process, va, 3)[0] == frames_of(process, va, 3)[2] == frames_of(other, there, 1)[0]
    assert listener.take() == [(Cause.COW, ((0, 1), (2, 1))), (Cause.COW, ((0, 1), (2, 1)))]
    assert heard.take() == [(Cause.COW, ((0, 1),))]
    run(host, process.store(va, b"z"))
    assert listener.take() == [(Cause.COW, ((0, 1),))]
    assert first_bytes(host, process, va, 3) == b"zba"
    assert run(host, other.load(there, 1)) == b"a"
    host.check()


def test_a_store_that_comes_before_the_comparison_prevents_merging() -> None:
    host, process, va, listener = filled("a", "a")
    run(host, process.madvise(va, 2 * PAGE, Advice.MERGEABLE))
    listener.slow = True
    task = host.scheduler.spawn("merge", host.merge_identical())
    host.scheduler.run()
    run(host, process.store(va, b"z"))
    listener.fences[0].signal()
    host.scheduler.run()
    assert task.result == 0
    assert first_bytes(host, process, va, 2) == b"za"
    host.check()


def test_pinned_pages_are_not_merged() -> None:
    host, process, va, _ = filled("a", "a")
    run(host, process.madvise(va, 2 * PAGE, Advice.MERGEABLE))
    held = run(host, process.pin(va, PAGE, write=True))
    assert run(host, host.merge_identical()) == 0
    process.unpin(held)
    host.check()


# Huge pages


def huge(n_frames: int = 2048, n_pages: int = HUGE) -> tuple[Host, Process, int, Listener]:
    host = host_of(n_frames, pages_per_step=512)
    process = host.spawn_process()
    va = run(host, process.mmap(n_pages, huge=True))
    return host, process, va, Listener(process, va // PAGE)


def test_a_first_store_brings_two_mebibytes_in_consecutive_frames() -> None:
    host, process, va, listener = huge()
    run(host, process.store(va + 5 * PAGE, b"x"))
    frames = frames_of(process, va, HUGE)
    assert frames[0] is not None
    assert frames == list(range(frames[0], frames[0] + HUGE))
    assert frames[0] % HUGE == 0
    assert process.table.is_huge(va // PAGE)
    assert listener.take() == []
    host.check()


def test_a_partial_unmap_splits_and_keeps_the_rest() -> None:
    host, process, va, listener = huge()
    run(host, process.store(va + 5 * PAGE, b"x"))
    frames = frames_of(process, va, HUGE)
    run(host, process.munmap(va + PAGE, PAGE))
    assert listener.take() == [(Cause.UNMAP, ((1, 1),))]
    assert not process.table.is_huge(va // PAGE)
    assert frames_of(process, va, HUGE) == [frames[0], None, *frames[2:]]
    assert run(host, process.load(va + 5 * PAGE, 1)) == b"x"
    host.check()


def test_a_partial_mprotect_splits_and_a_whole_one_does_not() -> None:
    host, process, va, _ = huge()
    run(host, process.store(va, b"x"))
    run(host, process.mprotect(va, HUGE * PAGE, Prot.READ))
    assert process.table.is_huge(va // PAGE)
    run(host, process.mprotect(va, 4 * PAGE, Prot.NONE))
    assert not process.table.is_huge(va // PAGE)


def test_without_consecutive_frames_pages_come_one_by_one() -> None:
    host, process, va, _ = huge(n_frames=600)
    run(host, process.store(va, b"x"))
    assert frames_of(process, va, 2)[1] is None
    assert run(host, process.load(va, 1)) == b"x"
    host.check()


def test_small_pages_are_collapsed_into_a_huge_one() -> None:
    host = host_of(2048, pages_per_step=512)
    process = host.spawn_process()
    va = run(host, process.mmap(HUGE, huge=True))
    run(host, process.madvise(va, HUGE * PAGE, Advice.NOHUGEPAGE))
    for at in range(HUGE):
        run(host, process.store(va + at * PAGE, at.to_bytes(2, "little")))
    listener = Listener(process, va // PAGE)
    assert run(host, host.collapse_huge(process, va // PAGE + 7))
    assert listener.take() == [(Cause.MIGRATE, ((0, HUGE),))]
    assert process.table.is_huge(va // PAGE)
    assert run(host, process.load(va + 300 * PAGE, 2)) == (300).to_bytes(2, "little")
    host.split_huge(process, va // PAGE)
    assert not process.table.is_huge(va // PAGE)
    assert listener.take() == [], "they stay where they are"
    host.check()


def test_what_is_not_all_there_is_not_collapsed() -> None:
    host, process, va, listener = huge()
    run(host, process.load(va, 1))
    assert not run(host, host.collapse_huge(process, va // PAGE))
    assert listener.take() == []
    host.check()


def test_a_store_to_a_page_of_a_shared_huge_one_splits_it_and_other_rights_keep_it_small() -> None:
    host, process, va, _ = huge()
    run(host, process.store(va, b"x"))
    child = run(host, process.fork())
    assert process.table.is_huge(va // PAGE), "lowered as a whole"
    run(host, child.exit())
    run(host, process.store(va, b"y"))
    assert not process.table.is_huge(va // PAGE)
    assert not run(host, host.collapse_huge(process, va // PAGE)), "one page may be written, the others may not"
    host.check()


# Exclusive access


def test_a_device_has_a_page_alone_until_a_cpu_touches_it() -> None:
    host, process, va, listener = filled("a")
    device, number = object(), va // PAGE
    run(host, process.make_exclusive(number, device))
    assert listener.take() == [(Cause.EXCLUSIVE, ((0, 1),))]
    assert lookup(process, number) is None
    frame = lookup_exclusive(process, number, device)
    assert frame is not None
    assert lookup_exclusive(process, number, object()) is None
    host.frames.write(frame, 0, b"device")
    assert run(host, process.load(va, 6)) == b"device"
    assert listener.take() == [(Cause.EXCLUSIVE, ((0, 1),))]
    assert lookup_exclusive(process, number, device) is None
    run(host, process.store(va, b"cpu"))
    assert listener.take() == []
    host.check()


def test_a_shared_or_pinned_page_is_nobody_s_alone() -> None:
    host, process, va, _ = filled("a")
    held = run(host, process.pin(va, PAGE, write=True))
    shared = run(host, process.mmap(1, shared=True))
    for at in (va, shared):
        with pytest.raises(NotSupported):
            run(host, process.make_exclusive(at // PAGE, object()))
    process.unpin(held)


@pytest.mark.parametrize("what", ["fork", "protect", "reclaim", "migrate"])
def test_a_page_that_a_device_has_alone_meets_events_like_any_other(what: str) -> None:
    host, process, va, listener = filled("a")
    device = object()
    run(host, process.make_exclusive(va // PAGE, device))
    frame = lookup_exclusive(process, va // PAGE, device)
    assert frame is not None
    host.frames.write(frame, 0, b"D")
    listener.take()
    if what == "fork":
        child = run(host, process.fork())
        assert run(host, child.load(va, 2)) == b"Da"
    elif what == "protect":
        run(host, process.mprotect(va, PAGE, Prot.READ))
    elif what == "reclaim":
        assert run(host, host.reclaim(1)) == 1
    else:
        assert run(host, host.migrate(process, [va // PAGE])) == 1
    assert len(listener.take()) == 1
    assert lookup_exclusive(process, va // PAGE, device) is None
    assert run(host, process.load(va, 2)) == b"Da"
    host.check()
