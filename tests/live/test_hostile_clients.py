"""Clients that scribble, flood, stall and lie: each harms itself at most, while another is served all the time."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from serving import (
    PATIENCE_S,
    RawClient,
    Server,
    client,
    create_qp,
    eventually,
    handle_of,
    hello,
    register,
    running_server,
)

from nopin import Access, Device, SendFlags, SendWr, Sge, WcStatus, WrOpcode
from nopin.control.codec import ProtocolError, encode
from nopin.control.messages import (
    PROTOCOL_VERSION,
    AllocPd,
    CreateChannel,
    CreateCq,
    GetStat,
    Hello,
    ModifyQp,
    QueryQp,
    Register,
)
from nopin.control.socket import ControlSocket
from nopin.errors import ServerGone, ServerRefused
from nopin.linux import memfd
from nopin.linux.userfaultfd import open_watch
from nopin.nic.abi import CONSUMER_OFFSET, CQE_BYTES, PRODUCER_OFFSET, QpState, ring_bytes
from nopin.nic.attributes import AddressVector, QpAttr
from nopin.units import PAGE_BYTES

DEPTH = 16
_FLAGS_OFFSET = 9
"""Of an entry's flags (abi.WQE_HEADER)."""
ALL = int(Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("hostile")) as running:
        yield running


class GoodClient:
    """Two connected queue pairs of one well-behaved client, which WRITEs to itself."""

    def __init__(self, server: Server) -> None:
        self.device = Device(server=str(server.path))
        pd = self.device.alloc_pd()
        self.cq = self.device.create_cq(64)
        self.memory = np.zeros(2 * PAGE_BYTES, np.uint8)
        self.region = pd.register(self.memory, access="rwa")
        self.one, self.two = pd.create_qp(self.cq), pd.create_qp(self.cq)
        self.one.connect(self.two.endpoint)
        self.two.connect(self.one.endpoint)
        self._count = 0

    def is_served(self) -> bool:
        """Carry out one WRITE and say whether it arrived."""
        self._count += 1
        self.memory[:8] = np.frombuffer(self._count.to_bytes(8, "little"), np.uint8)
        region = self.region
        here, there = region.address, region.address + PAGE_BYTES
        sge = Sge(here, 8, region.lkey)
        self.one.post_send(SendWr(WrOpcode.RDMA_WRITE, [sge], remote_address=there, rkey=region.rkey))
        (done,) = self.cq.wait(timeout=PATIENCE_S)
        return done.status == WcStatus.SUCCESS and bytes(self.memory[PAGE_BYTES : PAGE_BYTES + 8]) == bytes(
            self.memory[:8]
        )


@pytest.fixture
def good(server: Server) -> Iterator[GoodClient]:
    made = GoodClient(server)
    assert made.is_served()
    yield made
    assert made.is_served()
    made.device.close()
    assert server.count("internal_errors") == 0


class Scribbler:
    """A client with two connected queue pairs and every byte of their rings in its hands."""

    def __init__(self, server: Server, *, state: QpState = QpState.RTS) -> None:
        self.connection = ControlSocket(server.path)
        welcome = hello(self.connection)
        pd = handle_of(self.connection, AllocPd(seq=0))
        reply, (fd,) = self.connection.request(CreateCq(seq=0, depth=DEPTH))
        self.cq: int = reply.handle  # type: ignore[union-attr]  # the reply to CreateCq
        self.cq_memory = self._map(fd)
        self.rings: list[NDArray[np.uint8]] = []
        qpns = []
        for _ in range(2):
            made, fd = create_qp(self.connection, pd, self.cq)
            self.rings.append(self._map(fd))
            self.recv_offset, self.stride = made.recv_offset, made.send_stride
            qpns.append(made.qpn)
        self.memory = np.zeros(4 * PAGE_BYTES, np.uint8)
        self.region = register(self.connection, pd, self.memory.ctypes.data, self.memory.nbytes)
        self.qpns = qpns
        for ours, theirs in (qpns, qpns[::-1]):
            self._connect(ours, theirs, AddressVector(gid=welcome.gid, port=welcome.port))

    def _map(self, fd: int) -> NDArray[np.uint8]:
        memory = memfd.map_array(fd)
        os.close(fd)
        return memory

    def _connect(self, ours: int, theirs: int, av: AddressVector) -> None:
        for attr in (
            QpAttr(state=int(QpState.INIT), pkey_index=0, port_num=1, access=ALL),
            QpAttr(
                state=int(QpState.RTR),
                av=av,
                path_mtu=1024,
                dest_qpn=theirs,
                rq_psn=1,
                max_dest_rd_atomic=4,
                min_rnr_timer=12,
            ),
            QpAttr(state=int(QpState.RTS), timeout=14, retry_cnt=7, rnr_retry=7, sq_psn=1, max_rd_atomic=4),
        ):
            self.connection.request(ModifyQp(seq=0, qpn=ours, attr=attr))

    def set_index(self, memory: NDArray[np.uint8], offset: int, value: int) -> None:
        memory[offset : offset + 8] = np.frombuffer((value & (1 << 64) - 1).to_bytes(8, "little"), np.uint8)

    def post(self, index: int) -> None:
        """Post empty WRITEs, each with a completion, up to an index of at most DEPTH."""
        entries = self.rings[0][PAGE_BYTES : PAGE_BYTES + DEPTH * self.stride].reshape(DEPTH, self.stride)
        entries[:, _FLAGS_OFFSET] = int(SendFlags.SIGNALED)
        self.set_index(self.rings[0], PRODUCER_OFFSET, index)

    def is_gone(self) -> bool:
        try:
            self.connection.take_events()
        except ServerGone:
            return True
        return False

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def scribbler(server: Server) -> Iterator[Scribbler]:
    made = Scribbler(server)
    yield made
    made.close()


# --- rings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 1 << 63, 257, 1 << 32])
def test_an_impossible_producer_index_costs_the_client_its_session(
    server: Server, good: GoodClient, scribbler: Scribbler, index: int
) -> None:
    scribbler.set_index(scribbler.rings[0], PRODUCER_OFFSET, index)
    assert good.is_served()  # also wakes the server, which the scribbler did not
    assert eventually(scribbler.is_gone)


@pytest.mark.parametrize("index", [-1, 5, 1 << 63])
def test_an_impossible_consumer_index_of_completions_does_too(
    server: Server, good: GoodClient, scribbler: Scribbler, index: int
) -> None:
    scribbler.set_index(scribbler.cq_memory, CONSUMER_OFFSET, index)
    scribbler.post(1)
    assert good.is_served()
    assert eventually(scribbler.is_gone)


def test_an_index_that_runs_backwards_does_too(server: Server, good: GoodClient, scribbler: Scribbler) -> None:
    scribbler.post(3)
    assert eventually(lambda: good.is_served() and bool(scribbler.cq_memory[PRODUCER_OFFSET]))
    scribbler.post(2)
    assert good.is_served()
    assert eventually(scribbler.is_gone)


def test_what_the_client_writes_over_the_devices_own_words_changes_nothing_for_others(
    server: Server, good: GoodClient, scribbler: Scribbler
) -> None:
    for memory, offset in ((scribbler.rings[0], CONSUMER_OFFSET), (scribbler.cq_memory, PRODUCER_OFFSET)):
        scribbler.set_index(memory, offset, 0xDEADBEEF)
        assert good.is_served()
    assert not scribbler.is_gone()


@pytest.mark.parametrize("seed", range(3))
def test_random_entries_end_in_completions_never_in_the_server(server: Server, good: GoodClient, seed: int) -> None:
    """Well-formed indexes, random entries: any opcode, key, address, scatter list and inline length."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        scribbler = Scribbler(server)
        for ring in scribbler.rings:
            for start in (0, scribbler.recv_offset):
                entries = ring[start + PAGE_BYTES : start + PAGE_BYTES + DEPTH * 128].reshape(DEPTH, 128)
                entries[:] = rng.integers(0, 256, entries.shape, np.uint8)
                sensible = rng.random(DEPTH) < 0.7  # opcode and length of the scatter list
                entries[sensible, 8] = rng.integers(0, 12, int(sensible.sum()))
                entries[sensible, 10] = rng.integers(0, 3, int(sensible.sum()))
                entries[sensible, 11] = 0
        for ring in scribbler.rings:
            scribbler.set_index(ring[scribbler.recv_offset :], PRODUCER_OFFSET, DEPTH)
            scribbler.set_index(ring, PRODUCER_OFFSET, DEPTH)
        assert good.is_served()
        assert eventually(lambda scribbler=scribbler: scribbler.cq_memory[PRODUCER_OFFSET] > 0)  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        scribbler.close()


def test_scribbling_all_over_while_the_server_works_costs_only_the_scribbler(server: Server, good: GoodClient) -> None:
    """Every byte of every ring, index words included, again and again while good work runs."""
    rng = np.random.default_rng(1)
    gone = 0
    for _ in range(30):
        scribbler = Scribbler(server)
        for _ in range(10):
            memory = (*scribbler.rings, scribbler.cq_memory)[rng.integers(3)]
            at = int(rng.integers(0, len(memory) - 512))
            memory[at : at + 512] = rng.integers(0, 256, 512, np.uint8)
            memory[:8] = (int(rng.integers(0, DEPTH)), *[0] * 7)
            assert good.is_served()
        memory = scribbler.rings[0]
        memory[:] = rng.integers(0, 256, len(memory), np.uint8)
        assert good.is_served()
        gone += eventually(scribbler.is_gone)
        scribbler.close()
    assert gone == 30


# --- descriptors ----------------------------------------------------------------------------------------------


def test_a_doorbell_storm_does_not_keep_the_server_from_its_work(server: Server, good: GoodClient) -> None:
    with _doorbell(server) as doorbell:
        for _ in range(200):
            for _ in range(200):
                os.eventfd_write(doorbell, 1)
            assert good.is_served()


@pytest.mark.parametrize("count", [1, (1 << 64) - 2])
def test_a_doorbell_made_blocking_emptied_and_filled_holds_nobody_up(
    server: Server, good: GoodClient, count: int
) -> None:
    with _doorbell(server) as doorbell:
        os.set_blocking(doorbell, True)
        for _ in range(500):
            os.eventfd_write(doorbell, count)
            os.eventfd_read(doorbell)  # before the server can, or after
        os.eventfd_write(doorbell, count)
        for _ in range(50):
            assert good.is_served()


@contextlib.contextmanager
def _doorbell(server: Server) -> Iterator[int]:
    connection = ControlSocket(server.path)
    _, (page, doorbell, book) = connection.request(Hello(seq=0, version=PROTOCOL_VERSION))
    os.close(page)
    os.close(book)
    yield doorbell
    os.close(doorbell)
    connection.close()


def test_a_completion_channel_that_nobody_empties_holds_nobody_up(server: Server, good: GoodClient) -> None:
    """Its reader makes it blocking, reads nothing, fills it where it can, and keeps asking for more."""
    device = Device(server=str(server.path))
    channel = device.create_channel()
    os.set_blocking(channel.fileno(), True)
    cq = device.create_cq(64, channel)
    pd = device.alloc_pd()
    one, two = pd.create_qp(cq), pd.create_qp(cq)
    one.connect(two.endpoint)
    two.connect(one.endpoint)
    with open(f"/proc/self/fd/{channel.fileno()}", "wb", buffering=0) as back_way:
        os.set_blocking(back_way.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while back_way.write(bytes(65536)):
                pass
    for _ in range(100):
        cq.arm()
        one.post_send(SendWr(WrOpcode.RDMA_WRITE))
        assert eventually(lambda: len(cq.poll(1)) == 1)
        assert good.is_served()
    device.close()


@pytest.mark.needs_userfaultfd
def test_a_userfaultfd_made_blocking_behind_the_servers_back_ends_the_session(server: Server, good: GoodClient) -> None:
    before = server.count("clients_misbehaved")
    child = _child(server, "watched")
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        assert good.is_served()
        assert eventually(lambda: server.count("clients_misbehaved") == before + 1)
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


# --- talk -----------------------------------------------------------------------------------------------------


def test_truncated_messages_of_every_kind_are_refused(server: Server, good: GoodClient) -> None:
    messages = [
        encode(Register(seq=1, pd=1, address=4096, length=4096, iova=0, access=15, discipline=0)),
        encode(ModifyQp(seq=1, qpn=5, attr=QpAttr(state=1, av=AddressVector(gid=bytes(16))))),
        encode(QueryQp(seq=1, qpn=1 << 63)),
    ]
    before = server.count("clients_misbehaved")
    n_bad = 0
    for message in messages:
        for length in range(1, len(message), 3):
            bad = RawClient(server)
            bad.send(message[:length])
            assert bad.is_disconnected()
            bad.close()
            n_bad += 1
    assert server.count("clients_misbehaved") == before + n_bad


def test_numbers_at_their_limits_are_refused_one_by_one(server: Server, good: GoodClient) -> None:
    rng = random.Random(3)
    extremes = [0, 1, -1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)]
    with client(server) as connection:
        pd = handle_of(connection, AllocPd(seq=0))
        for _ in range(300):
            request = rng.choice(
                [
                    Register(
                        seq=0,
                        pd=rng.choice([pd, *extremes]),
                        address=rng.choice(extremes),
                        length=rng.choice([None, *extremes]),
                        iova=rng.choice(extremes),
                        access=rng.choice(extremes),
                        discipline=rng.choice([0, 1, 2, *extremes]),
                        ring_fd=rng.choice([None, *extremes]),
                    ),
                    CreateCq(seq=0, depth=rng.choice(extremes), channel=rng.choice([None, *extremes])),
                    ModifyQp(seq=0, qpn=rng.choice(extremes), attr=QpAttr(state=rng.choice(extremes))),
                ]
            )
            with contextlib.suppress(ServerRefused, ProtocolError):  # or granted; what counts is who is still served
                connection.request(request)
        assert good.is_served()
    assert server.count("internal_errors") == 0


def test_every_attribute_out_of_range_is_refused_and_harmless(server: Server, good: GoodClient) -> None:
    rng = random.Random(4)
    names = [
        "state", "cur_state", "path_mtu", "dest_qpn", "rq_psn", "sq_psn", "access", "timeout", "retry_cnt",
        "rnr_retry", "min_rnr_timer", "max_rd_atomic", "max_dest_rd_atomic", "pkey_index", "port_num",
    ]  # fmt: skip
    names = [name for name in names if hasattr(QpAttr(), name)]
    scribbler = Scribbler(server)
    for _ in range(300):
        values: dict[str, Any] = {
            name: rng.choice([-1, 0, 1, 2, 3, 7, 4096, 1 << 24, 1 << 32, 1 << 63]) for name in rng.sample(names, 3)
        }
        with contextlib.suppress(ServerRefused, ProtocolError):
            scribbler.connection.request(ModifyQp(seq=0, qpn=scribbler.qpns[0], attr=QpAttr(**values)))
        assert good.is_served()
    assert not scribbler.is_gone()
    scribbler.close()
    assert server.count("internal_errors") == 0


def test_a_client_that_reads_no_events_loses_the_oldest_and_nothing_else(server: Server, good: GoodClient) -> None:
    """Each connection that fails is an event; nobody reads them, and the client goes on to be served."""
    scribbler = Scribbler(server)
    attr = QpAttr(state=int(QpState.ERR))
    for qpn in scribbler.qpns:
        scribbler.connection.request(ModifyQp(seq=0, qpn=qpn, attr=attr))
    lazy = RawClient(server)
    lazy.sock.setblocking(False)
    n_sent = 0
    with contextlib.suppress(BlockingIOError):
        while n_sent < 5000:
            lazy.send(encode(GetStat(seq=n_sent)))
            n_sent += 1
    assert n_sent < 5000, "the server read everything of a client that reads nothing"
    for _ in range(50):
        assert good.is_served()
    lazy.close()
    scribbler.close()


# --- processes ------------------------------------------------------------------------------------------------

_CHILD = """
import mmap, os, sys, threading, time
import numpy as np
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_hostile_clients import Scribbler, watched
from serving import Server
server = Server(Path(sys.argv[1]), None)
if sys.argv[3] == "watched":
    watched(server)
else:
    scribbler = Scribbler(server)
    scribbler.set_index(scribbler.rings[0], 0, 8)
    print("done", flush=True)
time.sleep(60)
"""


def watched(server: Server) -> None:
    """Be the client that makes its userfaultfd blocking and then unmaps; runs in a process of its own."""
    import mmap
    import threading

    fd, _ = open_watch()
    connection = ControlSocket(server.path)
    connection.request(Hello(seq=0, version=PROTOCOL_VERSION, has_uffd=True), [fd])
    mapping = mmap.mmap(-1, 1 << 20)
    address = np.frombuffer(mapping, np.uint8).ctypes.data
    pd = handle_of(connection, AllocPd(seq=0))
    assert register(connection, pd, address, 1 << 20).watched
    os.set_blocking(fd, True)
    threading.Thread(target=mapping.madvise, args=(mmap.MADV_DONTNEED,), daemon=True).start()
    time.sleep(0.05)
    sys.stdout.write("done\n")
    sys.stdout.flush()
    time.sleep(60)


def _child(server: Server, what: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _CHILD, str(server.path), str(Path(__file__).parent), what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


def test_a_stopped_client_is_waited_for_by_nobody(server: Server, good: GoodClient) -> None:
    child = _child(server, "scribble")
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"done\n"
        child.send_signal(signal.SIGSTOP)
        for _ in range(100):
            assert good.is_served()
        rows = [row for row in server.rows("client") if row["pid"] == child.pid]
        assert len(rows) == 1, "a stopped process still has its session"
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert eventually(lambda: all(row["pid"] != child.pid for row in server.rows("client")))


def resident_kib(server: Server) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def test_misbehaving_clients_leave_no_descriptor_and_no_memory_behind(server: Server, good: GoodClient) -> None:
    def misbehave() -> None:
        scribbler = Scribbler(server)
        channel = handle_of(scribbler.connection, CreateChannel(seq=0))
        handle_of(scribbler.connection, CreateCq(seq=0, depth=1024, channel=channel))
        scribbler.set_index(scribbler.rings[0], PRODUCER_OFFSET, 1 << 40)
        assert good.is_served()
        assert eventually(scribbler.is_gone)
        scribbler.close()

    for _ in range(10):
        misbehave()
    assert eventually(lambda: len(server.rows("qp")) == 2)
    n_descriptors, kib = server.n_descriptors(), resident_kib(server)
    for _ in range(100):
        misbehave()
    assert eventually(lambda: server.n_descriptors() <= n_descriptors)
    assert resident_kib(server) < kib + 4096
    assert ring_bytes(1024, CQE_BYTES) * 100 > 4096 * 1024, "a leak of the rings would have been seen"
