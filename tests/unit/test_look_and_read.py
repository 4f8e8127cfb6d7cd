"""What a server reads of a process's messages, and what it leaves unread until it is seen what it is about."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import pytest

from nopin.linux.madvise_spy import Advice
from nopin.linux.paging_uffd import PagingUffd
from nopin.linux.pidfd import PidFd
from nopin.linux.uffd_handshake import EventKind
from nopin.ranges import Range
from nopin.server.mapper import GIVES_UP, KEEPS, UNKNOWN, Mapper, Placed

FAULT = (EventKind.PAGEFAULT, 0, 0x10000, 0)
WHERE = Range(0x12000, 0x14000)
REMOVE = (EventKind.REMOVE, WHERE.start, WHERE.end, 0)


class FakeUffd:
    """A queue of messages, faults first as the kernel hands them out; `late` come once somebody has looked."""

    def __init__(self, *messages: tuple[int, ...], late: tuple[tuple[int, ...], ...] = ()) -> None:
        self.messages = deque(messages)
        self.late = late

    def n_faults(self) -> int:
        return sum(kind == EventKind.PAGEFAULT for kind, *_ in self.messages)

    def waits(self) -> bool:
        waits = bool(self.messages)
        self.messages += self.late
        self.late = ()
        return waits

    def read(self, n_most: int) -> list[Any]:
        return [self.messages.popleft() for _ in range(min(n_most, len(self.messages)))]


class Sight:
    """What /proc shows: None for nobody yet, for so many looks."""

    def __init__(self, advice: list[Advice] | None, unseen: int = 0) -> None:
        self.advice = advice
        self.unseen = unseen
        self.n_looks = 0

    def __call__(self, _pid: int, mapped: list[Range]) -> list[Advice] | None:
        assert mapped == [Range(0x10000, 0x18000)]
        self.n_looks += 1
        return None if self.n_looks <= self.unseen else self.advice


@pytest.fixture
def process() -> Iterator[PidFd]:
    process = PidFd.open(os.getpid())
    yield process
    process.close()


def mapper_of(process: PidFd, uffd: FakeUffd) -> Mapper:
    return Mapper(1, cast("PagingUffd", uffd), [Placed(0, 8, 0x10000)], process, worker=False)


def see(monkeypatch: pytest.MonkeyPatch, sight: Sight) -> Sight:
    monkeypatch.setattr("nopin.server.mapper.advice_of", sight)
    return sight


def test_an_event_behind_faults_is_left_for_a_look_of_its_own(process: PidFd, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, Sight([Advice(WHERE, gives_up=True, thread=1)]))
    mapper = mapper_of(process, FakeUffd(FAULT, FAULT, REMOVE))
    assert mapper.look_and_read() == [FAULT, FAULT]
    assert mapper.look_and_read() == [(*REMOVE[:3], GIVES_UP)]


def test_an_event_that_comes_after_the_look_is_left_for_the_next(
    process: PidFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation that found the address space changing asks before the word of it has come."""
    see(monkeypatch, Sight([Advice(WHERE, gives_up=True, thread=1)]))
    mapper = mapper_of(process, FakeUffd(late=(REMOVE,)))
    assert mapper.look_and_read() == []
    assert mapper.look_and_read() == [(*REMOVE[:3], GIVES_UP)]


@pytest.mark.parametrize("gives_up", [True, False])
def test_an_event_is_left_unread_until_its_sender_is_seen(
    process: PidFd, monkeypatch: pytest.MonkeyPatch, gives_up: bool
) -> None:
    sight = see(monkeypatch, Sight([Advice(WHERE, gives_up, 1)], unseen=5))
    mapper = mapper_of(process, FakeUffd(REMOVE))
    for _ in range(5):
        assert mapper.look_and_read() == []
    assert mapper.look_and_read() == [(*REMOVE[:3], GIVES_UP if gives_up else KEEPS)]
    assert sight.n_looks == 6
    assert mapper.madvices.put_off == 5


def test_a_sender_that_is_never_seen_is_not_waited_for_for_ever(
    process: PidFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, Sight(None))
    uffd = FakeUffd(REMOVE, REMOVE)
    mapper = mapper_of(process, uffd)
    for n_left in (1, 0):
        found: list[Any] = []
        for _ in range(2000):
            found = found or mapper.look_and_read()
            if found:
                break
        assert found == [(*REMOVE[:3], UNKNOWN)]
        assert len(uffd.messages) == n_left


def test_where_it_is_not_ours_to_look_nothing_is_waited_for(process: PidFd, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, Sight([]))
    assert mapper_of(process, FakeUffd(REMOVE)).look_and_read() == [(*REMOVE[:3], UNKNOWN)]


def test_a_sender_that_was_seen_beside_another_is_waited_for(process: PidFd, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is woken when the other's message is read, and not to be seen until it sleeps again."""
    first, second = Advice(Range(0x10000, 0x11000), gives_up=False, thread=1), Advice(WHERE, gives_up=True, thread=2)
    newcomer = Advice(Range(0x14000, 0x15000), gives_up=False, thread=3)
    shows = deque([[first, second], [newcomer], [newcomer], [newcomer, second], [newcomer]])
    monkeypatch.setattr("nopin.server.mapper.advice_of", lambda _pid, _mapped: shows.popleft())
    keeps = [(EventKind.REMOVE, each.where.start, each.where.end, 0) for each in (first, newcomer)]
    mapper = mapper_of(process, FakeUffd(keeps[0], REMOVE, keeps[1]))
    assert mapper.look_and_read() == [(*keeps[0][:3], KEEPS)]
    assert mapper.look_and_read() == mapper.look_and_read() == []
    assert mapper.look_and_read() == [(*REMOVE[:3], GIVES_UP)]
    assert mapper.look_and_read() == [(*keeps[1][:3], KEEPS)]
    assert not shows


def test_bytes_are_given_up_where_of_two_threads_one_gives_them_up(
    process: PidFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, Sight([Advice(WHERE, gives_up=False, thread=1), Advice(WHERE, gives_up=True, thread=2)]))
    mapper = mapper_of(process, FakeUffd(REMOVE, REMOVE))
    assert mapper.look_and_read() == mapper.look_and_read() == [(*REMOVE[:3], GIVES_UP)]


def test_nothing_is_read_behind_a_move_that_is_still_to_be_dealt_with(
    process: PidFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, Sight([Advice(WHERE, gives_up=True, thread=1)]))
    move = (EventKind.REMAP, 0x10000, 0x90000, 0x8000)
    mapper = mapper_of(process, FakeUffd(move, REMOVE))
    mapper.unread += mapper.look_and_read()
    assert mapper.unread == [move]
    assert mapper.look_and_read() == []
    mapper.unread.clear()
    assert mapper.look_and_read() == [(*REMOVE[:3], GIVES_UP)]
