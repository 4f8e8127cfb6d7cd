"""mprotect, mremap and madvise of anonymous memory: what is read afterwards, and what devices are told."""

from __future__ import annotations

import pytest
from hosts import PAGE, Listener, frames_of, host_of, run

from nopin.mm.causes import Cause
from nopin.mm.device_faults import FaultPages
from nopin.mm.space import Reason
from nopin.model.host.advice import Advice
from nopin.model.host.errors import NotSupported, Segv
from nopin.model.host.fault import fault_pages, lookup
from nopin.model.host.host import Host
from nopin.model.host.process import Process
from nopin.model.host.vma import RW, Prot

BYTES = b"".join(bytes([letter]) * PAGE for letter in b"abcd")


def four_pages() -> tuple[Host, Process, int, Listener]:
    """Make a process with four pages, of a, b, c and d."""
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(4))
    run(host, process.store(va, BYTES))
    return host, process, va, Listener(process, va // PAGE)


def test_lowered_rights_stop_stores_and_leave_the_bytes_where_they_are() -> None:
    host, process, va, listener = four_pages()
    frames = frames_of(process, va, 4)
    run(host, process.mprotect(va + PAGE, 2 * PAGE, Prot.READ))
    assert listener.take() == [(Cause.PROTECT, ((1, 2),))]
    with pytest.raises(Segv):
        run(host, process.store(va + PAGE, b"x"))
    run(host, process.store(va, b"x"))
    assert run(host, process.load(va + PAGE, 2 * PAGE)) == BYTES[PAGE : 3 * PAGE]
    assert run(host, fault_pages(process, va // PAGE, 4, write=True)) == FaultPages(1, Reason.NO_ACCESS)
    run(host, process.mprotect(va, 4 * PAGE, RW))
    assert listener.take() == [], "raised rights concern nobody"
    run(host, process.store(va + PAGE, b"y"))
    assert run(host, process.load(va + PAGE, 2)) == b"yb"
    assert frames_of(process, va, 4) == frames
    host.check()


def test_no_rights_at_all_is_told_as_unmapped_and_keeps_the_bytes() -> None:
    host, process, va, listener = four_pages()
    run(host, process.mprotect(va, 2 * PAGE, Prot.NONE))
    assert listener.take() == [(Cause.UNMAP, ((0, 2),))]
    with pytest.raises(Segv):
        run(host, process.load(va, 1))
    assert lookup(process, va // PAGE) is None
    run(host, process.mprotect(va, 2 * PAGE, Prot.READ))
    assert run(host, process.load(va, 4 * PAGE)) == BYTES
    with pytest.raises(Segv):
        run(host, process.store(va, b"x"))
    run(host, process.munmap(va, 4 * PAGE))
    host.check()


def test_mprotect_of_a_hole_changes_nothing() -> None:
    host, process, va, listener = four_pages()
    run(host, process.munmap(va + PAGE, PAGE))
    listener.take()
    with pytest.raises(Segv):
        run(host, process.mprotect(va, 4 * PAGE, Prot.READ))
    run(host, process.store(va, b"x"))
    assert listener.take() == []


def test_a_mapping_that_moves_takes_its_pages_along() -> None:
    host, process, va, listener = four_pages()
    n_free = host.frames.n_free
    target = va + 64 * PAGE
    assert run(host, process.mremap(va + PAGE, 2 * PAGE, 2 * PAGE, to=target)) == target
    assert listener.take() == [(Cause.REMAP, ((1, 2),))]
    assert run(host, process.load(target, 2 * PAGE)) == BYTES[PAGE : 3 * PAGE]
    with pytest.raises(Segv):
        run(host, process.load(va + PAGE, 1))
    assert run(host, process.load(va, PAGE)) == BYTES[:PAGE]
    run(host, process.store(target, b"z"))
    assert host.frames.n_free == n_free, "nothing was copied"
    host.check()


def test_moving_onto_a_mapping_unmaps_that_first() -> None:
    host, process, va, listener = four_pages()
    assert run(host, process.mremap(va, PAGE, PAGE, to=va + 2 * PAGE)) == va + 2 * PAGE
    assert listener.take() == [(Cause.UNMAP, ((2, 1),)), (Cause.REMAP, ((0, 1),))]
    assert run(host, process.load(va + 2 * PAGE, 2 * PAGE)) == BYTES[:PAGE] + BYTES[3 * PAGE :]
    host.check()


def test_growing_in_place_adds_zeros_and_tells_nobody() -> None:
    host, process, va, listener = four_pages()
    assert run(host, process.mremap(va, 4 * PAGE, 6 * PAGE)) == va
    assert run(host, process.load(va, 6 * PAGE)) == BYTES + bytes(2 * PAGE)
    assert listener.take() == []


def test_growing_into_another_mapping_moves() -> None:
    host, process, va, listener = four_pages()
    assert run(host, process.mmap(1)) == va + 4 * PAGE
    target = run(host, process.mremap(va, 4 * PAGE, 5 * PAGE))
    assert target == va + 5 * PAGE
    assert run(host, process.load(target, 5 * PAGE)) == BYTES + bytes(PAGE)
    assert listener.take() == [(Cause.REMAP, ((0, 4),))]


def test_shrinking_unmaps_the_tail() -> None:
    host, process, va, listener = four_pages()
    assert run(host, process.mremap(va, 4 * PAGE, PAGE)) == va
    assert listener.take() == [(Cause.UNMAP, ((1, 3),))]
    with pytest.raises(Segv):
        run(host, process.load(va + PAGE, 1))
    host.check()


def test_moves_that_make_no_sense_change_nothing() -> None:
    host, process, va, listener = four_pages()
    with pytest.raises(NotSupported):
        run(host, process.mremap(va, 2 * PAGE, 2 * PAGE, to=va + PAGE))
    with pytest.raises(Segv):
        run(host, process.mremap(va, 5 * PAGE, PAGE))
    assert run(host, process.load(va, 4 * PAGE)) == BYTES
    assert listener.take() == []


def test_dropped_pages_read_as_zeros_and_free_their_frames() -> None:
    host, process, va, listener = four_pages()
    n_free = host.frames.n_free
    run(host, process.madvise(va + PAGE, 2 * PAGE, Advice.DONTNEED))
    assert listener.take() == [(Cause.REMOVE, ((1, 2),))]
    assert host.frames.n_free == n_free + 2
    assert run(host, process.load(va, 4 * PAGE)) == BYTES[:PAGE] + bytes(2 * PAGE) + BYTES[3 * PAGE :]
    host.check()


def test_populating_brings_pages_without_an_access() -> None:
    host = host_of()
    process = host.spawn_process()
    va = run(host, process.mmap(2))
    run(host, process.madvise(va, PAGE, Advice.POPULATE_READ))
    run(host, process.madvise(va + PAGE, PAGE, Advice.POPULATE_WRITE))
    first, second = lookup(process, va // PAGE), lookup(process, va // PAGE + 1)
    assert first is not None
    assert second is not None
    assert (first.page is host.zero_page, first.writable) == (True, False)
    assert (second.page is host.zero_page, second.writable) == (False, True)


def test_advice_about_a_hole_is_refused() -> None:
    host, process, va, _ = four_pages()
    with pytest.raises(Segv):
        run(host, process.madvise(va, 5 * PAGE, Advice.DONTNEED))
    assert run(host, process.load(va, 4 * PAGE)) == BYTES
