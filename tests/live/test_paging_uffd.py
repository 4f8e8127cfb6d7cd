"""userfaultfd as a page fault handler, and what goes with it: the arena's file, its mappings, swap files."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from owner_process import MADV_DONTNEED, MADV_REMOVE, Owner

from nopin.errors import UsageError
from nopin.linux import memfd
from nopin.linux.arena_file import map_somewhere, present, punch, resident_bytes
from nopin.linux.libc import unmap
from nopin.linux.paging_uffd import (
    FAULT_MINOR,
    FAULT_WP,
    FAULT_WRITE,
    PagingUffd,
    open_for_filling,
    open_paging,
    register_for_filling,
)
from nopin.linux.pidfd import PidFd
from nopin.linux.swap_file import SwapFile
from nopin.linux.uffd_handshake import EventKind, Feature
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
N_PAGES = 64
pytestmark = pytest.mark.needs_userfaultfd


class Paged:
    """A process that maps a file, and the test as its pager."""

    def __init__(self, owner: Owner, file: int, address: int, uffd: PagingUffd) -> None:
        self.owner = owner
        self.file = file
        self.address = address
        self.uffd = uffd

    def at(self, page: int) -> int:
        return self.address + page * PAGE

    def begin_get(self, page: int, length: int = 1) -> tuple[int, int]:
        """Have the process read a page; returns the fault's flags and page."""
        self.owner.begin("get", self.at(page), length)
        return self.fault()

    def begin_put(self, page: int, data: bytes) -> tuple[int, int]:
        self.owner.begin("put", self.at(page), data)
        return self.fault()

    def fault(self) -> tuple[int, int]:
        kind, flags, address, _ = self.message()
        assert kind == EventKind.PAGEFAULT
        return flags, (address - self.address) // PAGE

    def message(self) -> tuple[int, int, int, int]:
        while not (messages := self.uffd.read()):
            os.sched_yield()
        (message,) = messages
        return message


@contextlib.contextmanager
def paged_process() -> Iterator[Paged]:
    file = memfd.create("arena", N_PAGES * PAGE)
    with Owner() as owner:
        address, number, _ = owner.do("map_paged", file, N_PAGES * PAGE)
        handle = PidFd.open(owner.pid)
        uffd = PagingUffd(handle.take_fd(number))
        handle.close()
        yield Paged(owner, file, address, uffd)
        uffd.close()
    os.close(file)


@pytest.fixture
def paged() -> Iterator[Paged]:
    with paged_process() as made:
        yield made


def test_a_missing_page_is_told_and_filled_with_zeros(paged: Paged) -> None:
    assert paged.begin_get(3, 8) == (0, 3)
    assert paged.owner.is_busy()
    assert paged.uffd.zero(paged.at(3), PAGE) == (PAGE, 0)
    assert paged.owner.finish() == bytes(8)
    assert present(paged.file, 0, 5).tolist() == [False, False, False, True, False]


def test_a_missing_page_is_filled_with_bytes_and_a_store_to_it_is_heard(paged: Paged) -> None:
    source = np.arange(2 * PAGE, dtype=np.uint64).view(np.uint8)[: 2 * PAGE]
    assert paged.begin_put(5, b"x")[0] & FAULT_WRITE
    assert paged.uffd.copy(paged.at(5), source.ctypes.data, 2 * PAGE, protect=True) == (2 * PAGE, 0)
    flags, page = paged.fault()
    assert flags & FAULT_WP
    assert page == 5
    assert paged.uffd.lift(paged.at(5), PAGE) == 0
    paged.owner.finish()
    assert paged.owner.do("get", paged.at(5), 2 * PAGE) == b"x" + source.tobytes()[1:]


def test_a_page_the_file_has_is_a_minor_fault(paged: Paged) -> None:
    os.pwrite(paged.file, b"here", 7 * PAGE)
    flags, page = paged.begin_get(7, 4)
    assert (flags & FAULT_MINOR, page) == (FAULT_MINOR, 7)
    assert paged.uffd.zero(paged.at(7), PAGE) == (0, errno.EEXIST)
    assert paged.uffd.map_in(paged.at(7), PAGE, protect=False) == (PAGE, 0)
    assert paged.owner.finish() == b"here"
    assert paged.uffd.map_in(paged.at(7), PAGE, protect=False) == (0, errno.EEXIST)


def test_a_batch_tells_how_far_it_came(paged: Paged) -> None:
    os.pwrite(paged.file, b"here", 3 * PAGE)
    done, number = paged.uffd.zero(paged.at(0), 8 * PAGE)
    assert (done, number) == (3 * PAGE, errno.EAGAIN), "the pages before are done; asking again tells why"
    assert paged.uffd.zero(paged.at(3), 5 * PAGE) == (0, errno.EEXIST)
    assert paged.uffd.map_in(paged.at(20), PAGE, protect=False) == (0, errno.EFAULT)
    assert paged.uffd.zero(paged.at(N_PAGES), PAGE) == (0, errno.ENOENT)


def test_punched_pages_are_missing_again_and_their_memory_is_back(paged: Paged) -> None:
    assert paged.uffd.zero(paged.at(0), 8 * PAGE) == (8 * PAGE, 0)
    assert resident_bytes(paged.file) == 8 * PAGE
    punch(paged.file, 2 * PAGE, 6 * PAGE)
    assert resident_bytes(paged.file) == 2 * PAGE
    assert paged.begin_get(2) == (0, 2)
    paged.uffd.zero(paged.at(2), PAGE)
    paged.owner.finish()


def test_a_store_to_a_protected_page_that_is_punched_comes_back_as_missing(paged: Paged) -> None:
    paged.uffd.zero(paged.at(4), PAGE)
    assert paged.uffd.protect(paged.at(4), PAGE) == 0
    flags, _ = paged.begin_put(4, b"racing")
    assert flags & FAULT_WP
    punch(paged.file, 4 * PAGE, PAGE)
    assert paged.uffd.lift(paged.at(4), PAGE) == 0
    assert paged.fault() == (FAULT_WRITE, 4)
    paged.uffd.zero(paged.at(4), PAGE)
    paged.owner.finish()
    assert os.pread(paged.file, 6, 4 * PAGE) == b"racing"


def test_a_poisoned_page_ends_the_toucher_with_a_bus_error(paged: Paged) -> None:
    assert paged.begin_get(9) == (0, 9)
    assert paged.uffd.poison(paged.at(9), PAGE) == (PAGE, 0)
    _, status = os.waitpid(paged.owner.pid, 0)
    paged.owner.pid = 0
    assert os.WTERMSIG(status) == signal.SIGBUS


def test_operations_ask_to_be_repeated_until_an_event_is_read(paged: Paged) -> None:
    paged.owner.begin("advise", paged.at(0), PAGE, MADV_DONTNEED)
    while paged.uffd.zero(paged.at(1), PAGE) != (0, errno.EAGAIN):
        punch(paged.file, PAGE, PAGE)
    assert paged.message()[:3] == (EventKind.REMOVE, paged.at(0), paged.at(1))
    paged.owner.finish()
    assert paged.uffd.zero(paged.at(1), PAGE) == (PAGE, 0)


def test_remove_makes_holes_of_pages_where_dontneed_keeps_them(paged: Paged) -> None:
    paged.uffd.zero(paged.at(0), 2 * PAGE)
    for page, advice in ((0, MADV_DONTNEED), (1, MADV_REMOVE)):
        paged.owner.begin("advise", paged.at(page), PAGE, advice)
        assert paged.message()[0] == EventKind.REMOVE
        paged.owner.finish()
    assert present(paged.file, 0, 2).tolist() == [True, False]


def test_unmap_is_told_and_a_dead_process_is_noticed(paged: Paged) -> None:
    paged.owner.begin("unmap", paged.at(8), 2 * PAGE)
    assert paged.message()[:3] == (EventKind.UNMAP, paged.at(8), paged.at(10))
    paged.owner.finish()
    assert not paged.uffd.gone()
    paged.owner.kill()
    assert paged.uffd.gone()
    assert paged.uffd.zero(paged.at(0), PAGE) == (0, errno.ESRCH)
    assert paged.uffd.protect(paged.at(0), PAGE) == errno.ESRCH
    paged.uffd.wake(paged.at(0), PAGE)


def test_a_mapping_that_is_there_for_filling_takes_pages_and_never_makes_its_process_wait() -> None:
    file = memfd.create("arena", 3 * PAGE)
    array = memfd.map_array(file)
    uffd = PagingUffd(open_for_filling())
    register_for_filling(uffd.fileno(), Range.of_length(array.ctypes.data, 3 * PAGE))
    data = np.full(PAGE, 7, np.uint8)
    assert uffd.copy(array.ctypes.data, data.ctypes.data, PAGE, protect=False) == (PAGE, 0)
    os.pwrite(file, b"!", PAGE)
    assert bytes(array[:1]) == b"\x07"
    assert bytes(array[PAGE : PAGE + 1]) == b"!"
    assert array[2 * PAGE] == 0, "a hole reads as zeros, without a signal"
    assert uffd.read() == []
    uffd.close()
    os.close(file)


def test_what_is_no_usable_userfaultfd_is_refused() -> None:
    with open("/dev/null") as file, pytest.raises(UsageError, match="not a userfaultfd"):
        PagingUffd(file.fileno())
    fd, features = open_paging()
    assert Feature.POISON in features
    os.set_blocking(fd, True)
    with pytest.raises(UsageError, match="blocking"):
        PagingUffd(fd)
    os.close(fd)


def test_arenas_are_mapped_side_by_side_in_the_window() -> None:
    file = memfd.create("arena", PAGE)
    addresses = [map_somewhere(file, PAGE) for _ in range(3)]
    os.close(file)
    assert len(set(addresses)) == 3
    for address in addresses:
        unmap(address, PAGE)


def test_presence_is_right_for_scattered_pages() -> None:
    file = memfd.create("arena", 1 << 40)
    pages = [0, 1, 5, 63]
    for page in pages:
        os.pwrite(file, b"x", (1000 + page) * PAGE)
    assert np.flatnonzero(present(file, 1000, 64)).tolist() == pages
    assert np.flatnonzero(present(file, 1001, 5)).tolist() == [0, 4]
    assert not present(file, 1 << 20, 512).any()
    os.close(file)


def test_a_swap_file_gives_back_what_went_in_and_says_what_does_not_work(tmp_path: Path) -> None:
    swap = SwapFile(tmp_path)
    assert list(tmp_path.iterdir()) == []
    pieces = [np.random.default_rng(n).integers(0, 256, 512 * (n % 3 + 1), np.uint8) for n in range(1500)]
    whole = np.concatenate(pieces)
    assert swap.write(4096, pieces) == 0
    back = swap.read(4096, whole.nbytes)
    assert not isinstance(back, int)
    assert back.tobytes() == whole.tobytes()
    cached = swap.read_cached(4096, whole.nbytes)
    assert cached is None or cached.tobytes() == whole.tobytes()
    assert swap.read(4096 + whole.nbytes - 512, 1024) == errno.EIO, "beyond the end"
    swap.close()
    swap.close()
    assert swap.read(0, 512) == errno.EBADF


def test_a_swap_file_on_a_full_medium_says_so() -> None:
    full = os.open("/dev/full", os.O_RDWR)
    swap = SwapFile(Path("/tmp"))
    os.dup2(full, swap.fileno())
    os.close(full)
    assert swap.write(0, [np.zeros(512, np.uint8)]) == errno.ENOSPC
    swap.close()
