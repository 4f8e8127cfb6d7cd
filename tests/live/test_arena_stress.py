"""Everybody at once on one arena, and a checker that knows what each read may return.

Memory is cut into cells of one word, each with one writer, which counts up. A writer announces a value in a log outside
of the arena before it stores it, and notes it there as stored afterwards. A reader that looks at the log before and
after its read knows the bounds: at least what was stored when it began, at most what was announced when it ended.
Anything else was lost, stale or made up. The log is ordinary shared memory, which no pager touches.
"""

from __future__ import annotations

import mmap
import os
import random
import time
import traceback
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import nopin
from nopin.lab.servers import LocalServer
from nopin.units import PAGE_BYTES

N_PAGES = 96
CELLS_PER_PAGE = 4
WORDS_PER_PAGE = PAGE_BYTES // 8
N_WRITERS = 3
SECONDS = 3.0
pytestmark = pytest.mark.needs_userfaultfd
Words = NDArray[np.int64]


class Checker:
    """The log: of each cell, the last value announced and the last one stored."""

    def __init__(self) -> None:
        shared = mmap.mmap(-1, 2 * N_PAGES * CELLS_PER_PAGE * 8)
        both: Words = np.frombuffer(shared, np.int64).reshape(2, N_PAGES, CELLS_PER_PAGE)
        self.announced, self.stored = both

    def store(self, array: Words, page: int, cell: int) -> None:
        value = int(self.announced[page, cell]) + 1
        self.announced[page, cell] = value
        array[page, place_of(cell)] = value
        self.stored[page, cell] = value

    def check(self, read: Callable[[], Words], page: int, who: str) -> None:
        """Read a whole page by `read`, and judge its cells."""
        least = self.stored[page].copy()
        found = read()[[place_of(cell) for cell in range(CELLS_PER_PAGE)]]
        most = self.announced[page].copy()
        wrong = (found < least) | (found > most)
        assert not wrong.any(), f"{who} finds {found} in page {page}, at least {least}, at most {most} are possible"


def place_of(cell: int) -> int:
    return cell * (WORDS_PER_PAGE // CELLS_PER_PAGE) + cell


def in_child(work: Callable[[], None]) -> int:
    """Fork a process that does this; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def write_and_read(array: Words, checker: Checker, seed: int, cell: int, until: float) -> None:
    """Be the writer of one cell of each page, and read pages of everybody."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        checker.store(array, draw.randrange(N_PAGES), cell)
        page = draw.randrange(N_PAGES)
        checker.check(lambda at=page: array[at].copy(), page, f"process {cell}")  # type: ignore[misc]  # mypy cannot infer a lambda with a default


@pytest.mark.parametrize("seed", [1, 2])
def test_every_read_finds_what_it_may(server: LocalServer, seed: int) -> None:
    with nopin.Device(str(server.socket_path), budget=24 * PAGE_BYTES) as device:
        array: Words = device.zeros((N_PAGES, WORDS_PER_PAGE), np.int64)
        checker = Checker()
        until = time.monotonic() + SECONDS
        pids = [
            in_child(lambda cell=cell: write_and_read(array, checker, seed * 100 + cell, cell, until))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
            for cell in range(N_WRITERS)
        ]
        try:
            be_a_peer_and_the_evictor(device, array, checker, seed, until)
        finally:
            statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert statuses == [0] * N_WRITERS
        assert (checker.stored > 0)[:, :N_WRITERS].any()
        for page in range(N_PAGES):
            checker.check(lambda at=page: array[at], page, "the owner, afterwards")  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        (row,) = [each for each in device.stat() if each["kind"] == "arena"]
        assert row["evicted"] > N_PAGES
        assert row["lost"] == row["refused"] == 0


def be_a_peer_and_the_evictor(device: nopin.Device, array: Words, checker: Checker, seed: int, until: float) -> None:
    """Read and write over RDMA, as the writer of the last cell; change the budget and prefetch meanwhile."""
    draw = random.Random(seed)
    cell = CELLS_PER_PAGE - 1
    with device.share(array, access="rw") as share, nopin.attach(share.url, device=device) as remote:
        while time.monotonic() < until:
            page = draw.randrange(N_PAGES)
            value = int(checker.announced[page, cell]) + 1
            checker.announced[page, cell] = value
            remote[page, place_of(cell)] = value
            checker.stored[page, cell] = value
            page = draw.randrange(N_PAGES)
            checker.check(lambda at=page: remote[at], page, "the peer")  # type: ignore[misc]  # mypy cannot infer a lambda with a default
            kind = draw.random()
            if kind < 0.05:
                device.set_budget(draw.randrange(16, 48) * PAGE_BYTES)
            elif kind < 0.1:
                device.prefetch(array, draw.randrange(N_PAGES)).result(30)
