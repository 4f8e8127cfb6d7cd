"""Arenas by requests to a real server, whose pager is the small one of these tests; this process is the client."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import PATIENCE_S, Server, client, eventually

from nopin.control.arena_messages import (
    ArenaCreated,
    CancelPrefetch,
    CreateArena,
    DestroyArena,
    DiscardRange,
    MapArena,
    MapperKind,
    Prefetch,
    PrefetchDone,
    PrefetchStarted,
    PrefetchState,
    QueryPrefetch,
    SetBudget,
)
from nopin.control.messages import Handle
from nopin.control.socket import ControlSocket
from nopin.errors import ServerRefused
from nopin.linux.arena_file import map_somewhere
from nopin.linux.libc import unmap
from nopin.linux.paging_uffd import open_paging, register_paging
from nopin.ranges import Range
from nopin.units import PAGE_BYTES

PAGE = PAGE_BYTES
N_PAGES = 2048
BUDGET_PAGES = 256
pytestmark = pytest.mark.needs_userfaultfd


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    path = tmp_path / "server.sock"
    ready, theirs = os.pipe()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "nopin", "serve", "--socket", str(path), "--ready-fd", str(theirs)]
    process = subprocess.Popen(command, pass_fds=[theirs], env=environment)
    os.close(theirs)
    try:
        assert os.read(ready, 1), "the server did not come up"
        yield Server(path, process)
        assert process.poll() is None, "the server has ended"
    finally:
        os.close(ready)
        process.terminate()
        process.wait(PATIENCE_S)


class Mapped:
    """An arena mapped in this process."""

    def __init__(self, connection: ControlSocket, budget_pages: int = BUDGET_PAGES) -> None:
        self.connection = connection
        self.length = N_PAGES * PAGE
        request = CreateArena(seq=0, capacity_bytes=self.length, budget_bytes=budget_pages * PAGE, name="mine")
        created, (self.file, self.table, *self.store) = connection.request(request)
        assert isinstance(created, ArenaCreated)
        self.number = created.arena
        self.address = map_somewhere(self.file, self.length)
        self.uffd, features = open_paging()
        register_paging(self.uffd, Range.of_length(self.address, self.length))
        mapping = MapArena(
            seq=0, arena=self.number, base=self.address, offset=0, length=self.length, uffd_features=int(features)
        )
        reply, _ = connection.request(mapping, [self.uffd])
        assert isinstance(reply, Handle)

    def array(self) -> NDArray[np.uint8]:
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.length).from_address(self.address))

    def close(self) -> None:
        if self.address:
            unmap(self.address, self.length)
            self.address = 0
        for fd in (self.file, self.table, *self.store, self.uffd):
            with contextlib.suppress(OSError):
                os.close(fd)


@pytest.fixture
def connection(server: Server) -> Iterator[ControlSocket]:
    with client(server) as connected:
        yield connected


@pytest.fixture
def mapped(connection: ControlSocket) -> Iterator[Mapped]:
    made = Mapped(connection)
    yield made
    made.close()


def test_eight_times_the_budget_is_an_ordinary_array(server: Server, mapped: Mapped) -> None:
    array = mapped.array()
    assert not array[: 64 * PAGE].any()
    data = np.random.default_rng(7).integers(0, 256, mapped.length, np.uint8)
    array[:] = data
    assert np.array_equal(array, data)
    (row,) = server.rows("arena")
    assert row["name"] == "mine"
    assert row["resident"] <= (BUDGET_PAGES + 1) * PAGE
    assert row["evicted"] >= N_PAGES - BUDGET_PAGES
    assert row["faults_zero"]
    assert row["faults_swap"]
    assert 0 < sum(row["latency_ns"]["missing"]) < N_PAGES / 4, "a stream is read ahead"


def test_discarded_bytes_read_as_zeros_when_the_answer_comes(mapped: Mapped) -> None:
    array = mapped.array()
    array[: 512 * PAGE] = 9
    mapped.connection.request(DiscardRange(seq=0, arena=mapped.number, offset=PAGE, length=510 * PAGE))
    assert array[0] == 9
    assert not array[PAGE : 511 * PAGE].any()
    assert array[511 * PAGE] == 9


def test_a_smaller_budget_holds_when_the_answer_comes(server: Server, mapped: Mapped) -> None:
    mapped.array()[:] = 5
    mapped.connection.request(SetBudget(seq=0, arena=mapped.number, budget_bytes=16 * PAGE))
    (row,) = server.rows("arena")
    assert row["budget"] == 16 * PAGE
    assert row["resident"] <= 16 * PAGE
    assert mapped.array().min() == 5


def test_a_prefetch_tells_when_it_has_ended(mapped: Mapped) -> None:
    request = Prefetch(seq=0, arena=mapped.number, ranges=[(0, 100), (PAGE, 100 * PAGE), (50 * PAGE, 10)])
    started, _ = mapped.connection.request(request)
    assert isinstance(started, PrefetchStarted)
    assert started.n_bytes == 101 * PAGE
    (event,) = mapped.connection.take_events(PATIENCE_S)
    assert isinstance(event, PrefetchDone)
    assert (event.object_id, event.bytes_done, event.cause) == (started.prefetch, 101 * PAGE, "")
    state, _ = mapped.connection.request(QueryPrefetch(seq=0, prefetch=started.prefetch))
    assert isinstance(state, PrefetchState)
    assert (state.ended, state.bytes_done) == (True, 101 * PAGE)
    with pytest.raises(ServerRefused, match="no prefetch"):
        mapped.connection.request(CancelPrefetch(seq=0, prefetch=started.prefetch))


def test_an_arena_in_use_is_not_destroyed_and_one_unmapped_leaves_nothing(server: Server, mapped: Mapped) -> None:
    mapped.array()[:] = 1
    with pytest.raises(ServerRefused) as caught:
        mapped.connection.request(DestroyArena(seq=0, arena=mapped.number))
    assert caught.value.errno == errno.EBUSY
    unmap(mapped.address, mapped.length)
    mapped.address = 0
    mapped.connection.request(DestroyArena(seq=0, arena=mapped.number))
    assert server.rows("arena") == []
    assert os.fstat(mapped.file).st_blocks == 0


def test_memory_outlives_the_connection_and_ends_with_its_mapping(server: Server) -> None:
    with client(server) as connection:
        before = server.n_descriptors()
        mapped = Mapped(connection)
        mapped.array()[:] = 3
    assert mapped.array().min() == 3, "nobody is connected, and every byte is served"
    mapped.close()
    with client(server):
        assert eventually(lambda: server.n_descriptors() <= before)


@pytest.mark.parametrize(
    "change",
    [{"base": 1}, {"offset": PAGE}, {"length": 0}, {"length": N_PAGES * PAGE * 2}, {"uffd_features": 0}, {"arena": 99}],
)
def test_a_mapping_that_cannot_be_is_refused(server: Server, mapped: Mapped, change: dict[str, int]) -> None:
    request = MapArena(
        seq=0,
        arena=mapped.number,
        base=mapped.address,
        offset=0,
        length=mapped.length,
        uffd_features=(1 << 17) - 1,
    )
    for name, value in change.items():
        setattr(request, name, value)
    before = server.n_descriptors()
    with pytest.raises(ServerRefused):
        mapped.connection.request(request, [mapped.uffd])
    with open("/dev/null") as other, pytest.raises(ServerRefused, match="beside MapArena"):
        mapped.connection.request(
            MapArena(
                seq=0,
                arena=mapped.number,
                base=mapped.address,
                offset=0,
                length=PAGE,
                uffd_features=(1 << 17) - 1,
            ),
            [other.fileno()],
        )
    assert server.n_descriptors() == before
    mapped.array()[0] = 1


@pytest.mark.parametrize(("offset", "length"), [(1, PAGE), (0, 1), (-PAGE, PAGE), (0, 0), (N_PAGES * PAGE, PAGE)])
def test_a_discard_of_no_whole_pages_is_refused(mapped: Mapped, offset: int, length: int) -> None:
    with pytest.raises(ServerRefused):
        mapped.connection.request(DiscardRange(seq=0, arena=mapped.number, offset=offset, length=length))
    with pytest.raises(ServerRefused):
        mapped.connection.request(CreateArena(seq=0, capacity_bytes=offset + length + 7))


def test_a_child_that_got_no_answer_asks_again_and_is_served_once(server: Server, mapped: Mapped) -> None:
    mapped.array()[:PAGE] = 7
    elsewhere = Range.of_length(map_somewhere(mapped.file, mapped.length), mapped.length)
    uffd, features = open_paging()
    register_paging(uffd, elsewhere)
    numbers = []
    for _ in range(2):  # the first answer was lost with a server that was killed
        request = MapArena(
            seq=0,
            arena=0,
            base=elsewhere.start,
            offset=0,
            length=mapped.length,
            uffd_features=int(features),
            kind=MapperKind.CHILD,
        )
        with contextlib.closing(ControlSocket(server.path)) as connection:
            reply, _ = connection.request(request, [uffd, mapped.file])
            assert isinstance(reply, Handle)
            numbers.append(reply.handle)
    assert numbers[0] == numbers[1]
    assert ctypes.string_at(elsewhere.start, 2) == b"\7\7"
    assert server.rows("arena")[0]["mappers"] == 2
    unmap(elsewhere.start, elsewhere.length)
    os.close(uffd)
