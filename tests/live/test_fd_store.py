"""The descriptor store: entries outlive who made them, and looking does not take them out."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from nopin.linux.fd_store import FdStore
from nopin.linux.pidfd import PidFd


def memfd_with(data: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, data)
    return fd


def contents(fds: list[int]) -> list[bytes]:
    try:
        return [os.pread(fd, 100, 0) for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)


def put(store: FdStore, label: bytes, *data: bytes) -> None:
    fds = [memfd_with(each) for each in data]
    store.put(label, fds)
    for fd in fds:
        os.close(fd)


def put_until_full(store: FdStore, fd: int) -> int:
    n_put = 0
    with contextlib.suppress(BlockingIOError):
        while n_put < 1_000_000:
            store.put(b"entry", [fd])
            n_put += 1
    return n_put


def test_entries_come_in_order_and_stay() -> None:
    store = FdStore.create()
    put(store, b"first", b"one", b"two")
    put(store, b"second", b"three")
    for _ in range(2):
        found = [(label, contents(fds)) for label, fds in store.entries()]
        assert found == [(b"first", [b"one", b"two"]), (b"second", [b"three"])]
    put(store, b"third", b"four")
    assert [label for label, fds in store.entries() if contents(fds)] == [b"first", b"second", b"third"]
    store.close()


def test_an_empty_store_has_no_entries() -> None:
    store = FdStore.create()
    assert store.entries() == []
    store.close()


def test_a_store_outlives_who_filled_it_and_is_taken_from_a_stopped_keeper() -> None:
    """The keeper is stopped for the whole test: it does nothing for the store but exist."""
    store = FdStore.create()
    keeper = os.fork()
    if keeper == 0:
        time.sleep(60)
        os._exit(1)
    ends = store.ends  # the keeper inherited these numbers
    try:
        os.kill(keeper, signal.SIGSTOP)
        writer = os.fork()
        if writer == 0:
            put(store, b"left behind", b"payload")
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(writer, 0)
        store.close()
        process = PidFd.open(keeper)
        taken = FdStore(*(process.take_fd(end) for end in ends))
        assert [(label, contents(fds)) for label, fds in taken.entries()] == [(b"left behind", [b"payload"])]
        taken.close()
        process.close()
    finally:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)


def test_a_full_store_says_so_and_keeps_what_it_has() -> None:
    store = FdStore.create()
    fd = memfd_with(b"x")
    n_put = put_until_full(store, fd)
    assert n_put >= 100
    with pytest.raises(BlockingIOError):
        store.put(b"one more", [fd])
    os.close(fd)
    entries = store.entries()
    assert len(entries) == n_put
    for entry in entries:
        contents(entry.fds)
    store.close()


def test_descriptors_of_another_kind_are_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match=r"(?i)socket operation on non-socket|no store"):
        FdStore(reader, writer)
    for fd in (reader, writer):
        os.close(fd)
