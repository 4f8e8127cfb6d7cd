"""Clients of a real server: what they may do, what happens when they misbehave, and that nothing of them stays."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from serving import (
    PATIENCE_S,
    RawClient,
    Server,
    client,
    create_qp,
    eventually,
    handle_of,
    hello,
    one_of_each,
    register,
    running_server,
)

from nopin.control.codec import encode
from nopin.control.messages import (
    PROTOCOL_VERSION,
    AllocPd,
    CreateChannel,
    CreateCq,
    DeallocPd,
    Deregister,
    DestroyChannel,
    DestroyCq,
    DestroyQp,
    GetStat,
    Hello,
    ModifyQp,
    QpAttributes,
    QueryQp,
    Register,
    Stat,
)
from nopin.control.socket import ControlSocket
from nopin.errors import ServerError, ServerGone, ServerRefused
from nopin.linux import memfd
from nopin.nic.abi import PRODUCER_OFFSET, QpState
from nopin.nic.attributes import AddressVector, QpAttr

GID = bytes(10) + b"\xff\xff" + bytes([127, 0, 0, 9])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_a_client_is_welcomed_and_told_where_it_is(server: Server) -> None:
    connection = ControlSocket(server.path)
    welcome = hello(connection)
    connection.close()
    assert welcome.server_pid == server.pid
    assert len(welcome.gid) == 16
    assert welcome.exchange_port > 0
    assert welcome.limits["qps"] > 0
    assert not welcome.watching


def test_the_state_page_can_be_read_and_not_written(server: Server) -> None:
    connection = ControlSocket(server.path)
    _, (page, doorbell, book) = connection.request(Hello(seq=0, version=PROTOCOL_VERSION))
    assert int(memfd.map_array(page, writable=False)[:8].view(np.uint64)[0]) in (0, 1)
    with pytest.raises(PermissionError):
        memfd.map_array(page, writable=True)
    with pytest.raises(PermissionError):
        os.ftruncate(page, 0)
    for fd in (page, doorbell, book):
        os.close(fd)
    connection.close()


def test_another_version_is_refused_with_a_reason(server: Server) -> None:
    connection = ControlSocket(server.path)
    with pytest.raises(ServerRefused, match=f"protocol {PROTOCOL_VERSION}, the client 99") as caught:
        connection.request(Hello(seq=0, version=99))
    assert caught.value.code == "version"
    connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1garbage",
        bytes(range(256)),
        encode(AllocPd(seq=3))[:-1],
        b"x" * 65536,
        b"x" * 100_000,
        msgspec.msgpack.encode({"op": "no such request", "seq": 1}),
        encode(Hello(seq=2, version=PROTOCOL_VERSION)),
    ],
    ids=["garbage", "bytes", "truncated", "longest", "oversized", "unknown", "hello twice"],
)
def test_a_client_that_talks_nonsense_is_disconnected_and_others_are_served(server: Server, data: bytes) -> None:
    before = server.count("clients_misbehaved")
    with client(server) as good:
        bad = RawClient(server)
        bad.send(data)
        assert bad.is_disconnected()
        bad.close()
        assert handle_of(good, AllocPd(seq=0)) > 0
    assert server.count("clients_misbehaved") == before + 1


def test_anything_before_hello_is_a_disconnect(server: Server) -> None:
    bad = RawClient(server, greeted=False)
    bad.send(encode(AllocPd(seq=1)))
    assert bad.is_disconnected()
    bad.close()


def test_random_and_mutated_messages_leave_the_server_standing(server: Server) -> None:
    rng = random.Random(7)
    valid = [
        encode(Register(seq=1, pd=1, address=4096, length=4096, iova=0, access=15, discipline=0)),
        encode(CreateCq(seq=1, depth=16)),
        encode(ModifyQp(seq=1, qpn=5, attr=QpAttr(state=1, av=AddressVector(gid=GID)))),
        encode(GetStat(seq=1)),
    ]
    for _ in range(300):
        data = bytearray(rng.choice(valid))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        bad = RawClient(server)
        bad.send(bytes(data[: rng.randrange(1, len(data) + 1)]))
        bad.close()
    with client(server) as good:
        assert handle_of(good, AllocPd(seq=0)) > 0
    assert server.count("internal_errors") == 0


@pytest.mark.parametrize("n_fds", [1, 2, 64])
def test_descriptors_nobody_asked_for_end_the_session_and_are_not_kept(server: Server, n_fds: int) -> None:
    with client(server):
        before = server.n_descriptors()
        bad = RawClient(server)
        with open(os.devnull, "rb") as file:
            bad.send(encode(AllocPd(seq=2)), [file.fileno()] * n_fds)
        assert bad.is_disconnected()
        bad.close()
        assert eventually(lambda: server.n_descriptors() <= before)


def test_a_userfaultfd_that_is_none_is_refused(server: Server) -> None:
    connection = ControlSocket(server.path)
    with open(os.devnull, "rb") as file, pytest.raises(ServerRefused, match="no userfaultfd"):
        connection.request(Hello(seq=0, version=PROTOCOL_VERSION, has_uffd=True), [file.fileno()])
    connection.close()


def test_a_client_names_only_objects_of_its_own(server: Server) -> None:
    with client(server) as owner, client(server) as other:
        pd, cq, qpn = one_of_each(owner)
        mr = register(owner, pd, 4096, 4096).mr
        for request in (
            DeallocPd(seq=0, pd=pd),
            DestroyCq(seq=0, cq=cq),
            DestroyQp(seq=0, qpn=qpn),
            QueryQp(seq=0, qpn=qpn),
            ModifyQp(seq=0, qpn=qpn, attr=QpAttr(state=int(QpState.ERR))),
            Deregister(seq=0, mr=mr),
            Register(seq=0, pd=pd, address=4096, length=4096, iova=0, access=0, discipline=0),
        ):
            with pytest.raises(ServerRefused, match="of this client") as caught:
                other.request(request)
            assert caught.value.errno == errno.EINVAL
        reply, _ = owner.request(QueryQp(seq=0, qpn=qpn))
        assert isinstance(reply, QpAttributes)
        assert reply.attr.state == QpState.RESET


def test_objects_in_use_cannot_be_destroyed(server: Server) -> None:
    with client(server) as connection:
        channel = handle_of(connection, CreateChannel(seq=0))
        cq = handle_of(connection, CreateCq(seq=0, depth=4, channel=channel))
        pd = handle_of(connection, AllocPd(seq=0))
        qp, fd = create_qp(connection, pd, cq)
        os.close(fd)
        for request in (
            DeallocPd(seq=0, pd=pd),
            DestroyCq(seq=0, cq=cq),
            DestroyChannel(seq=0, channel=channel),
        ):
            with pytest.raises(ServerRefused) as caught:
                connection.request(request)
            assert caught.value.errno == errno.EBUSY
        connection.request(DestroyQp(seq=0, qpn=qp.qpn))
        connection.request(DestroyCq(seq=0, cq=cq))
        connection.request(DestroyChannel(seq=0, channel=channel))
        connection.request(DeallocPd(seq=0, pd=pd))


@pytest.mark.parametrize(
    ("address", "length", "iova"),
    [
        (4096, 0, 0),
        (4096, -1, 0),
        ((1 << 64) - 4096, 8192, 0),
        (4096, 8192, (1 << 64) - 4096),
        (4096, None, 0),
        (0, None, 4096),
    ],
)
def test_impossible_ranges_are_refused(server: Server, address: int, length: int | None, iova: int) -> None:
    with client(server) as connection:
        pd = handle_of(connection, AllocPd(seq=0))
        request = Register(seq=0, pd=pd, address=address, length=length, iova=iova, access=0, discipline=0)
        with pytest.raises(ServerRefused) as caught:
            connection.request(request)
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("ring_fd", [None, 0, 99_999, -1])
def test_a_pin_without_a_ring_is_refused(server: Server, ring_fd: int | None) -> None:
    with client(server) as connection:
        pd = handle_of(connection, AllocPd(seq=0))
        request = Register(seq=0, pd=pd, address=4096, length=4096, iova=0, access=0, discipline=2, ring_fd=ring_fd)
        with pytest.raises(ServerRefused):
            connection.request(request)
        assert handle_of(connection, AllocPd(seq=0)) > 0


def test_a_client_that_scribbles_on_its_rings_is_disconnected(server: Server) -> None:
    connection = ControlSocket(server.path)
    hello(connection)
    pd = handle_of(connection, AllocPd(seq=0))
    cq = handle_of(connection, CreateCq(seq=0, depth=16))
    qp, fd = create_qp(connection, pd, cq)
    memory = memfd.map_array(fd)
    os.close(fd)
    for attr in (
        QpAttr(state=int(QpState.INIT), pkey_index=0, port_num=1, access=0),
        QpAttr(
            state=int(QpState.RTR),
            av=AddressVector(gid=GID),
            path_mtu=1024,
            dest_qpn=7,
            rq_psn=1,
            max_dest_rd_atomic=1,
            min_rnr_timer=12,
        ),
        QpAttr(state=int(QpState.RTS), timeout=14, retry_cnt=7, rnr_retry=7, sq_psn=1, max_rd_atomic=1),
    ):
        connection.request(ModifyQp(seq=0, qpn=qp.qpn, attr=attr))
    memory[PRODUCER_OFFSET : PRODUCER_OFFSET + 8] = 0xFF
    # Nobody rang the doorbell; asking for figures wakes the server as well.
    assert eventually(lambda: bool(server.rows("dev")) and is_gone(connection))
    assert server.rows("qp") == []


def is_gone(connection: ControlSocket) -> bool:
    try:
        connection.take_events()
    except ServerGone:
        return True
    return False


_VICTIM = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from nopin.control.socket import ControlSocket
from serving import hello, one_of_each, register
connection = ControlSocket(Path(sys.argv[1]))
hello(connection)
pd, _, _ = one_of_each(connection)
register(connection, pd, 4096, 1 << 30)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_everything_of_a_killed_client_is_torn_down(server: Server, how: signal.Signals) -> None:
    command = [sys.executable, "-c", _VICTIM, str(server.path), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    try:
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"ready\n"
        assert [row["pid"] for row in server.rows("mr")] == [victim.pid]
        assert len(server.rows("qp")) == 1
        victim.send_signal(how)
        victim.wait(PATIENCE_S)
        for kind in ("mr", "qp", "cq"):
            assert eventually(lambda kind=kind: server.rows(kind) == [])  # type: ignore[misc]  # mypy cannot infer a lambda with a default
    finally:
        victim.kill()
        victim.wait()
        assert victim.stdout is not None
        victim.stdout.close()


def test_descriptors_and_memory_maps_do_not_grow_over_many_clients(server: Server) -> None:
    def cycle() -> None:
        with client(server) as connection:
            channel = handle_of(connection, CreateChannel(seq=0))
            handle_of(connection, CreateCq(seq=0, depth=16, channel=channel))
            pd, _, _ = one_of_each(connection)
            register(connection, pd, 4096, 1 << 20)

    def n_maps() -> int:
        return Path(f"/proc/{server.pid}/maps").read_text().count("nopin-ring")

    cycle()
    before = server.n_descriptors()
    for _ in range(200):
        cycle()
    assert eventually(lambda: server.n_descriptors() <= before)
    assert eventually(lambda: n_maps() == 0)


def test_many_rows_of_figures_come_in_one_answer(server: Server) -> None:
    with client(server) as connection:
        pd = handle_of(connection, AllocPd(seq=0))
        for n in range(600):
            register(connection, pd, 4096 * (n + 1), 4096)
        stat, _ = connection.request(GetStat(seq=0))
        assert isinstance(stat, Stat)
        assert sum(row["kind"] == "mr" for row in stat.rows) == 600


def test_a_client_that_reads_no_replies_does_not_stop_the_server(server: Server) -> None:
    lazy = RawClient(server)
    lazy.sock.setblocking(False)
    request = encode(GetStat(seq=2))
    with contextlib.suppress(BlockingIOError):
        while True:
            lazy.send(request)
    with client(server) as good:
        assert handle_of(good, AllocPd(seq=0)) > 0
    lazy.close()


def test_a_second_server_on_the_same_socket_says_who_has_it(server: Server, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nopin.server.service import ServeConfig, serve;"
        "serve(ServeConfig(socket_path=Path(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    second = subprocess.run(
        [sys.executable, "-c", code, str(server.path)], env=environment, capture_output=True, timeout=PATIENCE_S
    )
    assert f"a device server (pid {server.pid}) already serves {server.path}" in second.stderr.decode()
    with client(server) as good:
        assert handle_of(good, AllocPd(seq=0)) > 0


def test_a_killed_servers_socket_is_taken_over(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(tmp_path / "server.sock"))
    stale.close()
    with running_server(tmp_path) as server, client(server) as connection:
        assert handle_of(connection, AllocPd(seq=0)) > 0
    assert not (tmp_path / "server.sock").exists()


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    from nopin.server.clients import SocketFile

    tmp_path.chmod(0o777)
    with pytest.raises(ServerError, match="directory of mode 700"):
        SocketFile(tmp_path / "server.sock")


def test_a_server_ends_with_its_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    code = (
        "import sys; from pathlib import Path; from nopin.server.service import ServeConfig, serve;"
        "serve(ServeConfig(socket_path=Path(sys.argv[1]), ready_fd=int(sys.argv[2]), parent_pid=int(sys.argv[3])))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ready, theirs = os.pipe()
    command = [sys.executable, "-c", code, str(tmp_path / "server.sock"), str(theirs), str(parent.pid)]
    child = subprocess.Popen(command, env=environment, pass_fds=[theirs])
    os.close(theirs)
    try:
        assert os.read(ready, 1) == b"\n"
        child.send_signal(signal.SIGINT)  # Ctrl-C is the parent's to act on
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        parent.kill()
        assert child.wait(PATIENCE_S) == 0
    finally:
        os.close(ready)
        for process in (parent, child):
            process.kill()
            process.wait()
        assert parent.stdin is not None
        parent.stdin.close()
