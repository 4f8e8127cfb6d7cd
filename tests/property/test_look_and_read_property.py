"""Whatever threads of a process do around it, what a madvise is for is known when its message is read.

A model of the kernel's side: messages are read first in, first out, faults before all others. Who sent what is no fault
waits inside of the call, and /proc shows that, but not while it runs: each message that is read wakes the senders of
all others for a moment. Who was read goes on, and may sleep inside of the call for other reasons. New calls begin and
threads fault at any time, between any two looks of ours too. (Two things are left out: a signal that takes a fault back
between the count and the read, and a thread that comes after the look, is woken by the read that follows, and is still
not asleep at the next.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nopin.linux import madvise_spy
from nopin.linux.paging_uffd import Message, PagingUffd
from nopin.linux.pidfd import PidFd
from nopin.linux.uffd_handshake import EventKind
from nopin.mm.effects import PageRun
from nopin.mm.residency import Pages
from nopin.ranges import Range
from nopin.server.mapper import GIVES_UP, KEEPS, Mapper, Placed
from nopin.units import PAGE_BYTES

N_PAGES = 16
BASE = 0x10000
N_CALLS, N_CALLS_AT_ONCE = 40, 4
N_SEEDS = 30
FAULT: Message = (EventKind.PAGEFAULT, 0, BASE, 0)


class Call:
    """A madvise. It is asleep until its message is read, but for moments; then it goes on, and ends."""

    def __init__(self, thread: int, pages: PageRun, *, gives_up: bool) -> None:
        self.thread = thread
        self.pages = pages
        self.where = Range.of_length(BASE + pages.first * PAGE_BYTES, pages.n * PAGE_BYTES)
        self.gives_up = gives_up
        self.was_seen = False
        self.is_awake = False
        self.was_read = False


class Process:
    """The process, the kernel's queue of its messages, and /proc. Implements what `Mapper` uses of `PagingUffd`."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.n_left = N_CALLS
        self.n_faults_waiting = 0
        self.calls: list[Call] = []
        self.expected: set[int] = set()
        self.n_given_up = self.n_kept = 0
        self.just_read: list[Call] = []

    # The process

    def goes_on(self) -> None:
        """Let a few things happen."""
        for call in list(self.calls):
            if self.random.random() < 0.3:
                call.is_awake = call.was_read and self.random.random() < 0.5
                if call.was_read and self.random.random() < 0.3:
                    self.calls.remove(call)
        if self.n_left and len(self.calls) < N_CALLS_AT_ONCE and self.random.random() < 0.2:
            first = self.random.randrange(N_PAGES)
            pages = PageRun(first, self.random.randrange(1, min(6, N_PAGES - first) + 1))
            self.calls.append(Call(self.n_left, pages, gives_up=self.random.random() < 0.5))
            self.n_left -= 1
        if self.random.random() < 0.05:
            self.n_faults_waiting += 1

    @property
    def _unread(self) -> list[Call]:
        return [call for call in self.calls if not call.was_read]

    # The userfaultfd

    def n_faults(self) -> int:
        self.goes_on()
        return self.n_faults_waiting

    def waits(self) -> bool:
        self.goes_on()
        return bool(self.n_faults_waiting or self._unread)

    def read(self, n_most: int = 256) -> list[Message]:
        self.goes_on()
        messages: list[Message] = []
        while len(messages) < n_most and self.n_faults_waiting:
            self.n_faults_waiting -= 1
            messages.append(FAULT)
        while len(messages) < n_most and self._unread:
            call = self._unread[0]
            pages = set(range(call.pages.first, call.pages.end))
            assert not call.gives_up or pages <= self.expected, "killed now, nobody would give them up"
            call.was_read = call.is_awake = True
            self.just_read.append(call)
            for other in self._unread:
                other.is_awake = other.was_seen
            messages.append((EventKind.REMOVE, call.where.start, call.where.end, 0))
        return messages

    # /proc

    def listed(self, _folder: str) -> list[str]:
        self.goes_on()
        return [str(call.thread) for call in self.calls]

    def call_of(self, _folder: str, thread: int) -> Any:
        self.goes_on()
        call = next((call for call in self.calls if call.thread == thread), None)
        if call is None or call.is_awake:
            return None
        call.was_seen = call.was_seen or not call.was_read
        return madvise_spy._Call(madvise_spy._SYS_MADVISE, call.where, 9 if call.gives_up else 4, thread)

    def waits_to_be_heard(self, thread: str) -> bool:
        number = int(thread.rpartition("/")[2])
        return any(call.thread == number for call in self._unread)

    # Who is told

    def expect_removal(self, runs: Sequence[PageRun]) -> Pages:
        fresh = {page for run in runs for page in range(run.first, run.end)} - self.expected
        self.expected |= fresh
        return np.array(sorted(fresh), np.int64)

    def expect_no_more(self, expected: Pages, read: Sequence[PageRun]) -> None:
        stay = {page for run in read for page in range(run.first, run.end)}
        self.expected -= set(expected.tolist()) - stay

    def judge(self, messages: list[Message]) -> None:
        """Check what was made of messages, and heed them."""
        read, self.just_read = self.just_read, []
        removals = [message for message in messages if message[0] == EventKind.REMOVE]
        for call, (_, start, end, said) in zip(read, removals, strict=True):
            assert (start, end) == (call.where.start, call.where.end)
            others = [each for each in self._unread if each.gives_up and each.where.contains(call.where)]
            assert said in ({GIVES_UP} if call.gives_up else {GIVES_UP, KEEPS} if others else {KEEPS})
            self.n_given_up += said == GIVES_UP
            self.n_kept += said == KEEPS
            if said == GIVES_UP:
                self.expected -= set(range(call.pages.first, call.pages.end))


@pytest.fixture(scope="module")
def own() -> Iterator[PidFd]:
    process = PidFd.open(os.getpid())
    yield process
    process.close()


def answer_everything(own: PidFd, seed: int) -> Process:
    process = Process(seed)
    mapper = Mapper(1, cast(PagingUffd, process), [Placed(0, N_PAGES, BASE)], own, worker=False)
    mapper.removals = process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "listdir", process.listed)
        patch.setattr(madvise_spy, "_call_of", process.call_of)
        if madvise_spy._waits_to_be_heard is WAITS_TO_BE_HEARD:
            patch.setattr(madvise_spy, "_waits_to_be_heard", process.waits_to_be_heard)
        for _ in range(100 * N_CALLS):
            process.judge(mapper.look_and_read())
            if not (process.n_left or process._unread):
                break
    assert not process._unread, "somebody waits in madvise for ever"
    assert not mapper.madvices.unknown
    return process


WAITS_TO_BE_HEARD = madvise_spy._waits_to_be_heard


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_what_a_madvise_is_for_is_known_when_its_message_is_read(own: PidFd, seed: int) -> None:
    process = answer_everything(own, seed)
    assert process.n_given_up
    assert process.n_kept


def messages_behind_faults_are_read_unseen(patch: pytest.MonkeyPatch) -> None:
    look = Mapper.look_and_read
    patch.setattr(
        Mapper, "look_and_read", lambda mapper: mapper.uffd.read() if mapper.uffd.n_faults() else look(mapper)
    )


def what_comes_after_the_look_is_read(patch: pytest.MonkeyPatch) -> None:
    look = Mapper.look_and_read
    patch.setattr(Mapper, "look_and_read", lambda mapper: look(mapper) if mapper.uffd.waits() else mapper.uffd.read())


def more_is_read_than_was_looked_at(patch: pytest.MonkeyPatch) -> None:
    read = Process.read
    patch.setattr(Process, "read", lambda process, n_most=256: read(process, max(n_most, 2)))


def messages_are_read_though_their_sender_was_not_seen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("nopin.server.mapper._LOOKS_MAX", 0)


def who_was_seen_to_wait_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    read = Mapper._read_one

    def forgetful(mapper: Mapper, advice: Any) -> list[Message]:
        messages = read(mapper, advice)
        mapper.owed = set()
        return messages

    patch.setattr(Mapper, "_read_one", forgetful)


def threads_count_that_sleep_elsewhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(madvise_spy, "_waits_to_be_heard", lambda _thread: True)


def a_successor_is_told_when_the_message_was_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Process, "expect_removal", lambda _process, _runs: np.empty(0, np.int64))


@pytest.mark.parametrize(
    "break_rule",
    [
        messages_behind_faults_are_read_unseen,
        what_comes_after_the_look_is_read,
        more_is_read_than_was_looked_at,
        messages_are_read_though_their_sender_was_not_seen,
        who_was_seen_to_wait_is_forgotten,
        threads_count_that_sleep_elsewhere,
        a_successor_is_told_when_the_message_was_read,
    ],
)
def test_a_broken_rule_is_caught(
    break_rule: Callable[[pytest.MonkeyPatch], None], own: PidFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rule(monkeypatch)
    for seed in range(N_SEEDS):
        try:
            answer_everything(own, seed)
        except AssertionError:
            return
    pytest.fail(f"{N_SEEDS} processes saw nothing wrong")
