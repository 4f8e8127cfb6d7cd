"""The owner of the arena, and the processes it forks.

It stores and loads as everybody does. Besides, it does to its memory what programs do: madvise, fork, mprotect,
prefetches, other budgets, arrays made and freed; and to others what happens to processes: they are stopped for a
moment, or killed. When its server is killed what it asks of that one fails, and its memory goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nopin.errors import PageLost, PrefetchFailed, ServerError, WorkerGone
from nopin.lab.line import Line
from nopin.lab.mapping import MADV_DONTNEED
from nopin.lab.stress.actor import Actor, Broken, ByCpu
from nopin.lab.stress.giver import Giver
from nopin.lab.stress.journal import Entry, Journal
from nopin.lab.stress.log import Log, Words, memory_of
from nopin.lab.stress.spec import ACCELERATOR, BUDGETS_PAGES, LAYOUT, N_ACTORS, N_GIVERS, N_WRITERS, OWNER
from nopin.linux import memfd
from nopin.linux.arena_file import resident_bytes
from nopin.linux.libc import LIBC, PROT_READ, PROT_WRITE, checked
from nopin.linux.prctl import set_parent_death_signal
from nopin.units import PAGE_BYTES
from nopin.verbs.accelerator import Accelerator
from nopin.verbs.device import Device

CHURN_PAGES_MAX = 24
STOP_S_MAX = 0.05
_JOB_TIMEOUT_S = 60.0
_WAIT_S = 30.0


def owner(line: Line[Any], socket_path: str, log_fd: int, journal_path: str, seed: int, seconds: float) -> None:
    """Life of the owner process: sends the share's URL and when all end, and at last the most memory it took."""
    device = Device(socket_path, budget=BUDGETS_PAGES[0] * PAGE_BYTES)
    array: Words = device.zeros(**memory_of(LAYOUT))
    log, journal = Log(memfd.map_array(log_fd), LAYOUT), Journal(Path(journal_path))
    share = device.share(array)
    until = time.monotonic() + seconds
    line.send([share.url, until])
    writers = [fork(journal, partial(_write, log, journal, array, at, seed, until)) for at in range(1, N_WRITERS + 1)]
    me = Owner(device, array, log, journal, seed, writers)
    jobs = threading.Thread(target=me.keep_accelerator_busy, args=(until,))
    jobs.start()
    end_as_told(journal, log, lambda: me.actor.run(until, me.step), "owner")
    jobs.join()
    for pid in writers:
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status):
            journal.write(Entry(failure=f"a writer ended with exit code {os.waitstatus_to_exitcode(status)}"))
    line.send("done")
    line.receive()  # the peers have ended, too
    end_as_told(journal, log, me.read_everything, "owner")
    journal.write(Entry(tally=me.actor.tally))
    line.send(me.resident_bytes_max)


def _write(log: Log, journal: Journal, array: Words, index: int, seed: int, until: float) -> None:
    actor = Actor(log, f"writer {index}", index, N_ACTORS, seed, ByCpu(array))
    giver = Giver(actor, array, index, N_GIVERS)

    def step() -> None:
        choose = actor.draw.random()
        if choose < 0.8:
            actor.step()
        elif choose < 0.96:
            giver.store()
        else:
            giver.give_up()
            actor.count("madvise_remove")

    end_as_told(journal, log, lambda: actor.run(until, step), actor.tally.who)
    journal.write(Entry(tally=actor.tally))


def end_as_told(journal: Journal, log: Log, work: Callable[[], None], who: str) -> None:
    """Do something to its end, and write down why it ended early, if it did."""
    try:
        work()
    except Broken as broken:
        journal.write(Entry(violation=broken.violation))
    except BaseException as error:  # whatever it is, all must end and tell
        log.stop()
        journal.write(Entry(failure=f"{who}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))


def fork(journal: Journal, work: Callable[[], None]) -> int:
    """Have a forked child do something; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        set_parent_death_signal(signal.SIGKILL)
        work()
        status = 0
    except BaseException as error:
        journal.write(Entry(failure=f"a forked child: {type(error).__name__}: {error}\n{traceback.format_exc()}"))
    finally:
        os._exit(status)


class ByAccelerator:
    """A way to memory: each load and store is a job."""

    def __init__(self, accelerator: Accelerator, array: Words) -> None:
        self._accelerator = accelerator
        self._array = array

    def load(self, pages: slice) -> Words:
        """See `Way`."""
        found = self._accelerator.launch("nopin.lab.stress.kernels.load", self._array[pages]).result(_JOB_TIMEOUT_S)
        words: Words = np.frombuffer(found, np.int64).reshape(self._array[pages].shape)
        return words

    def store(self, page: int, cell: int, words: Words) -> None:
        """See `Way`."""
        kernel, target = "nopin.lab.stress.kernels.store", self._array[page, cell]
        self._accelerator.launch(kernel, target, words.tobytes()).result(_JOB_TIMEOUT_S)


class Owner:
    """What the owner process does in its main thread, and in the one that feeds the accelerator.

    Args:
        writers: the processes it has forked.

    Attributes:
        resident_bytes_max: the most memory its arena took, at any look.
    """

    def __init__(
        self, device: Device, array: Words, log: Log, journal: Journal, seed: int, writers: Sequence[int]
    ) -> None:
        self.actor = Actor(log, "owner", OWNER, N_ACTORS, seed, ByCpu(array))
        self.resident_bytes_max = 0
        self._giver = Giver(self.actor, array, OWNER, N_GIVERS)
        self._device = device
        self._accelerator = device.accelerator()
        self._array = array
        self._log = log
        self._journal = journal
        self._seed = seed
        self._writers = writers
        self._draw = self.actor.draw
        self._operations: dict[str, Callable[[], None]] = {
            "madvise_remove": self._giver.give_up,
            "madvise_dontneed": self._drop,
            "fork": self._fork,
            "mprotect": self._protect,
            "prefetch": self._prefetch,
            "budget": self._change_budget,
            "arrays": self._churn,
            "stop": self._stop_for_a_moment,
            "worker_killed": self._kill_worker,
        }

    def step(self) -> None:
        """Do as everybody does, store to what is given up now and then, or do something to the memory."""
        choose = self._draw.random()
        if choose < 0.6:
            self.actor.step()
        elif choose < 0.8:
            self._giver.store()
        elif choose < 0.85:
            self.actor.read_counters()
        else:
            name = self._draw.choice(list(self._operations))
            self._operations[name]()
            self.actor.count(name)
            self.resident_bytes_max = max(self.resident_bytes_max, resident_bytes(self._device.default_arena.memory_fd))

    def keep_accelerator_busy(self, until: float) -> None:
        """Load and store by jobs."""
        way = ByAccelerator(self._accelerator, self._array)
        actor = Actor(self._log, "accelerator", ACCELERATOR, N_ACTORS, self._seed, way)

        def step() -> None:
            try:
                actor.step()
            except PageLost:
                raise
            except (WorkerGone, ServerError):  # killed by us; or just begun, for which it needs a server
                actor.tally.interrupted += 1

        end_as_told(self._journal, self._log, lambda: actor.run(until, step), actor.tally.who)
        self._journal.write(Entry(tally=actor.tally))

    def read_everything(self) -> None:
        """Judge every word, now that nobody stores."""
        for page in range(self._log.layout.n_cells_pages):
            self.actor.read(slice(page, page + 1))
        self.actor.read_counters()

    # What is done to the memory

    def _drop(self) -> None:
        part = self._array[self._some_pages()]
        checked(LIBC.madvise(part.ctypes.data, part.nbytes, MADV_DONTNEED), "madvise")

    def _fork(self) -> None:
        pages = self._some_pages()
        child = Actor(self._log, "a forked child", OWNER, N_ACTORS, self._seed, self.actor.way)
        pid = fork(self._journal, lambda: end_as_told(self._journal, self._log, lambda: child.read(pages), "a child"))
        os.waitpid(pid, 0)

    def _protect(self) -> None:
        pages = self._some_pages()
        part = self._array[pages]
        place = ctypes.c_void_p(part.ctypes.data), ctypes.c_size_t(part.nbytes)
        checked(LIBC.mprotect(*place, PROT_READ), "mprotect")
        self.actor.read(slice(pages.start, min(pages.stop, self._log.layout.n_cells_pages)))
        checked(LIBC.mprotect(*place, PROT_READ | PROT_WRITE), "mprotect")

    def _prefetch(self) -> None:
        pages = self._some_pages()
        write = self._draw.random() < 0.5
        try:
            self._ask(lambda: self._device.prefetch(self._array, pages, write=write).result(_WAIT_S))
        except PrefetchFailed as problem:
            if problem.reason != "no_room":  # it displaces nothing that proved to be wanted
                raise

    def _change_budget(self) -> None:
        budget = self._draw.choice(BUDGETS_PAGES) * PAGE_BYTES
        self._ask(lambda: self._device.set_budget(budget))

    def _churn(self) -> None:
        """Arrays come and go beside the one that all share."""
        n_words = self._draw.randrange(1, CHURN_PAGES_MAX) * PAGE_BYTES // 8
        array, value = self._device.zeros(n_words, np.int64), self._draw.randrange(1, 1 << 40)
        assert not array.any(), "fresh zeros are not zeros"
        array[:] = value
        assert (array == value).all(), f"a fresh array of {n_words} words does not hold what was stored"
        del array
        if self._draw.random() < 0.3:
            self._ask(self._device.default_arena.trim)

    def _stop_for_a_moment(self) -> None:
        """Stop a writer or a worker, in the middle of whatever it does."""
        pid = self._draw.choice([*self._writers, *self._accelerator.pids])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self._draw.uniform(0.0, STOP_S_MAX))
            os.kill(pid, signal.SIGCONT)

    def _kill_worker(self) -> None:
        """Kill the accelerator's worker; its next job gets another one."""
        for pid in self._accelerator.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _ask(self, what: Callable[[], object]) -> None:
        """Ask something of the server, which may have been killed."""
        try:
            what()
        except ServerError:
            self.actor.tally.interrupted += 1

    def _some_pages(self) -> slice:
        """A run of pages of cells."""
        n_pages = self._log.layout.n_cells_pages
        first = self._draw.randrange(n_pages)
        return slice(first, self._draw.randrange(first + 1, min(n_pages, first + 32) + 1))
