"""fork of modelled processes: copies on either side's store, nested, and what is pinned."""

from __future__ import annotations

import pytest
from hosts import PAGE, Listener, frames_of, host_of, run

from nopin.mm.causes import Cause
from nopin.model.host.advice import Advice
from nopin.model.host.errors import NoMemory, OverMemlock, Segv
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.host.vma import RW, Prot


def one_page(text: bytes = b"parent", **settings: int) -> tuple[Host, Process, int]:
    host = host_of(**settings)
    process = host.spawn_process()
    va = run(host, process.mmap(1))
    run(host, process.store(va, text))
    return host, process, va


def read(host: Host, process: Process, va: int, n: int = 6) -> bytes:
    return run(host, process.load(va, n))


@pytest.mark.parametrize("child_writes", [True, False])
def test_a_page_is_shared_until_one_side_writes(child_writes: bool) -> None:
    host, parent, va = one_page()
    listener = Listener(parent, va // PAGE)
    n_free = host.frames.n_free
    child = run(host, parent.fork())
    assert listener.take() == [(Cause.FORK, ((0, 1),))]
    assert host.frames.n_free == n_free
    assert frames_of(parent, va, 1) == frames_of(child, va, 1)
    writer, other = (child, parent) if child_writes else (parent, child)
    run(host, writer.store(va, b"writer"))
    assert (read(host, writer, va), read(host, other, va)) == (b"writer", b"parent")
    assert listener.take() == ([] if child_writes else [(Cause.COW, ((0, 1),))])
    before = frames_of(other, va, 1)
    run(host, other.store(va, b"other!"))
    assert frames_of(other, va, 1) == before, "the last one writes in place"
    assert listener.take() == []
    assert host.frames.n_free == n_free - 1
    host.check()


def test_nested_forks_each_keep_what_they_had() -> None:
    host, parent, va = one_page()
    child = run(host, parent.fork())
    grandchild = run(host, child.fork())
    run(host, child.store(va, b"child!"))
    late = run(host, child.fork())
    run(host, parent.store(va, b"PARENT"))
    run(host, late.store(va, b"late!!"))
    texts = [read(host, process, va) for process in (parent, child, grandchild, late)]
    assert texts == [b"PARENT", b"child!", b"parent", b"late!!"]
    for process in (child, parent, late, grandchild):
        host.check()
        run(host, process.exit())
    assert host.frames.in_use() == [host.zero_page.frame]


def test_a_child_that_ends_leaves_the_page_to_be_written_in_place() -> None:
    host, parent, va = one_page()
    child = run(host, parent.fork())
    frames = frames_of(parent, va, 1)
    run(host, child.exit())
    run(host, parent.store(va, b"again!"))
    assert frames_of(parent, va, 1) == frames


def test_untouched_memory_stays_the_zero_page_on_both_sides() -> None:
    host = host_of()
    parent = host.spawn_process()
    va = run(host, parent.mmap(2))
    run(host, parent.load(va, 1))
    child = run(host, parent.fork())
    run(host, child.store(va, b"x"))
    assert read(host, parent, va, 2 * PAGE) == bytes(2 * PAGE)
    host.check()


def test_ranges_are_omitted_or_wiped_where_that_was_asked_for() -> None:
    host = host_of()
    parent = host.spawn_process()
    va = run(host, parent.mmap(3))
    run(host, parent.store(va, b"a" * 3 * PAGE))
    run(host, parent.madvise(va, PAGE, Advice.DONTFORK))
    run(host, parent.madvise(va + PAGE, PAGE, Advice.WIPEONFORK))
    listener = Listener(parent, va // PAGE)
    child = run(host, parent.fork())
    assert listener.take() == [(Cause.FORK, ((2, 1),))]
    with pytest.raises(Segv):
        read(host, child, va)
    assert read(host, child, va + PAGE, 2 * PAGE) == bytes(PAGE) + b"a" * PAGE
    assert read(host, parent, va, 3 * PAGE) == b"a" * 3 * PAGE


def test_rights_taken_away_stay_so_in_the_child() -> None:
    host, parent, va = one_page()
    run(host, parent.mprotect(va, PAGE, Prot.NONE))
    child = run(host, parent.fork())
    with pytest.raises(Segv):
        read(host, child, va)
    run(host, child.mprotect(va, PAGE, RW))
    run(host, child.store(va, b"child!"))
    run(host, parent.mprotect(va, PAGE, Prot.READ))
    assert (read(host, parent, va), read(host, child, va)) == (b"parent", b"child!")
    host.check()


@pytest.mark.parametrize("write", [True, False])
def test_a_pinned_page_stays_with_the_parent_and_the_child_gets_a_copy_at_once(write: bool) -> None:
    host, parent, va = one_page()
    held = run(host, parent.pin(va, PAGE, write=write))
    child = run(host, parent.fork())
    assert frames_of(parent, va, 1) == [held.frame(va // PAGE)]
    assert frames_of(child, va, 1) != frames_of(parent, va, 1)
    run(host, parent.store(va, b"PARENT"))
    assert host.frames.read(held.frame(va // PAGE), 0, 6) == b"PARENT"
    assert read(host, child, va) == b"parent"
    parent.unpin(held)
    host.check()


def test_a_pinned_page_that_may_not_be_accessed_is_copied_for_the_child_too() -> None:
    host, parent, va = one_page()
    held = run(host, parent.pin(va, PAGE, write=True))
    run(host, parent.mprotect(va, PAGE, Prot.NONE))
    child = run(host, parent.fork())
    with pytest.raises(Segv):
        read(host, child, va)
    for process in (parent, child):
        run(host, process.mprotect(va, PAGE, RW))
    run(host, parent.store(va, b"PARENT"))
    assert frames_of(parent, va, 1) == [held.frame(va // PAGE)]
    assert read(host, child, va) == b"parent"
    parent.unpin(held)
    host.check()


def test_pinning_a_shared_page_makes_it_the_processs_own_first() -> None:
    host, parent, va = one_page()
    child = run(host, parent.fork())
    listener = Listener(parent, va // PAGE)
    held = run(host, parent.pin(va + 3, 1, write=False))
    assert listener.take() == [(Cause.COW, ((0, 1),))]
    run(host, child.store(va, b"child!"))
    run(host, parent.store(va, b"PARENT"))
    assert host.frames.read(held.frame(va // PAGE), 0, 6) == b"PARENT"
    parent.unpin(held)


def test_an_unmapped_page_stays_with_who_pinned_it() -> None:
    host, process, va = one_page()
    held = run(host, process.pin(va, PAGE, write=True))
    run(host, process.munmap(va, PAGE))
    assert run(host, process.mmap(1, at=va)) == va
    run(host, process.store(va, b"newmap"))
    assert host.frames.read(held.frame(va // PAGE), 0, 6) == b"parent"
    run(host, process.exit())
    n_free = host.frames.n_free
    process.unpin(held)
    assert host.frames.n_free == n_free + 1
    host.check()


def test_pins_are_charged_by_page_not_by_pin() -> None:
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(4))
    process.memlock_limit_bytes = 2 * PAGE
    first = run(host, process.pin(va, 2 * PAGE, write=True))
    second = run(host, process.pin(va, 2 * PAGE, write=True))
    with pytest.raises(OverMemlock):
        run(host, process.pin(va + PAGE, 2 * PAGE, write=True))
    assert len(process.pinned) == 2
    process.unpin(first)
    assert len(process.pinned) == 2
    process.unpin(second)
    assert len(process.pinned) == 0
    run(host, process.pin(va + 2 * PAGE, 2 * PAGE, write=True))
    host.check()


def test_a_fork_that_cannot_copy_a_pinned_page_leaves_no_child() -> None:
    host, parent, va = one_page(n_frames=2, n_swap_slots=0)
    held = run(host, parent.pin(va, PAGE, write=True))
    listener = Listener(parent)
    with pytest.raises(NoMemory):
        run(host, parent.fork())
    assert [cause for cause, _ in listener.take()] == [Cause.FORK]
    assert list(host.processes) == [parent.pid]
    run(host, parent.store(va, b"goes on"))
    parent.unpin(held)
    host.check()
