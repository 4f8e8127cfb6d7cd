"""What one client may have is bounded, each bound with a clear error, and reaching it harms nobody else."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest
from serving import (
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

from nopin.control.messages import AllocPd, CreateChannel, CreateCq, DeallocPd, Publish, Published, Withdraw
from nopin.control.packets import close_all
from nopin.control.socket import ControlSocket
from nopin.errors import ServerGone, ServerRefused
from nopin.nic.attributes import QpCaps
from nopin.verbs.child_server import connect_or_start

LIMITS = {
    "pds": 3,
    "regions": 3,
    "cqs": 3,
    "qps": 3,
    "channels": 3,
    "shares": 3,
    "cq_depth": 1 << 12,
    "qp_depth": 1 << 10,
    "clients": 4,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("limits"), **LIMITS) as running:
        yield running


def make_share(connection: ControlSocket, mr: int) -> str:
    reply, _ = connection.request(Publish(seq=0, mr=mr, dtype="|u1", shape=[4096], strides=[1]))
    assert isinstance(reply, Published)
    return reply.share


def make_four(make: Callable[[], object]) -> None:
    for _ in range(4):
        make()


def test_every_kind_of_object_has_its_limit(server: Server) -> None:
    with client(server) as connection:
        pd, cq, _ = one_of_each(connection)
        mr = register(connection, pd, 4096, 4096).mr
        makers: dict[str, Callable[[], object]] = {
            "pds": lambda: handle_of(connection, AllocPd(seq=0)),
            "regions": lambda: register(connection, pd, 4096, 4096),
            "cqs": lambda: handle_of(connection, CreateCq(seq=0, depth=16)),
            "qps": lambda: close_all([create_qp(connection, pd, cq)[1]]),
            "channels": lambda: handle_of(connection, CreateChannel(seq=0)),
            "shares": lambda: make_share(connection, mr),
        }
        for name, make in makers.items():
            with pytest.raises(ServerRefused, match=f"{name} refused: this client has 3 of 3") as caught:
                make_four(make)  # some are there already: one of the four is the first too many
            assert (caught.value.code, caught.value.errno) == ("limit", errno.ENOSPC)


def test_a_limit_is_per_client_and_room_comes_back(server: Server) -> None:
    with client(server) as first, client(server) as second:
        pds = [handle_of(first, AllocPd(seq=0)) for _ in range(3)]
        with pytest.raises(ServerRefused, match="pds refused"):
            first.request(AllocPd(seq=0))
        assert handle_of(second, AllocPd(seq=0)) > 0
        first.request(DeallocPd(seq=0, pd=pds[0]))
        assert handle_of(first, AllocPd(seq=0)) not in pds


@pytest.mark.parametrize("depth", [0, -1, (1 << 12) + 1, 1 << 40])
def test_an_impossible_depth_of_a_completion_queue_is_refused(server: Server, depth: int) -> None:
    with client(server) as connection, pytest.raises(ServerRefused) as caught:
        connection.request(CreateCq(seq=0, depth=depth))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "caps",
    [
        QpCaps(max_send_wr=(1 << 10) + 1),
        QpCaps(max_recv_wr=1 << 40),
        QpCaps(max_send_sge=33),
        QpCaps(max_recv_sge=1 << 30),
        QpCaps(max_inline=1025),
        QpCaps(max_send_wr=-1),
        QpCaps(max_inline=-64),
    ],
    ids=str,
)
def test_impossible_capacities_of_a_queue_pair_are_refused(server: Server, caps: QpCaps) -> None:
    with client(server) as connection:
        pd = handle_of(connection, AllocPd(seq=0))
        cq = handle_of(connection, CreateCq(seq=0, depth=16))
        with pytest.raises(ServerRefused) as caught:
            create_qp(connection, pd, cq, caps)
        assert caught.value.errno == errno.EINVAL


def test_a_refused_queue_pair_leaves_nothing_behind(server: Server) -> None:
    with client(server) as connection:
        pd = handle_of(connection, AllocPd(seq=0))
        cq = handle_of(connection, CreateCq(seq=0, depth=16))
        for _ in range(10):
            with pytest.raises(ServerRefused):
                create_qp(connection, pd, cq, QpCaps(max_inline=1025))
        for _ in range(3):
            close_all([create_qp(connection, pd, cq)[1]])


def test_granted_depths_are_powers_of_two(server: Server) -> None:
    with client(server) as connection:
        pd = handle_of(connection, AllocPd(seq=0))
        cq = handle_of(connection, CreateCq(seq=0, depth=16))
        granted, fd = create_qp(connection, pd, cq, QpCaps(max_send_wr=100, max_recv_wr=0))
        close_all([fd])
        assert (granted.caps.max_send_wr, granted.caps.max_recv_wr) == (128, 1)
        assert granted.n_bytes % 4096 == 0


def test_more_clients_than_allowed_are_turned_away_with_the_reason(server: Server) -> None:
    many = [RawClient(server) for _ in range(4)]
    late = ControlSocket(server.path)
    with pytest.raises(ServerGone, match="there are 4 clients already"):
        hello(late)
    late.close()
    with pytest.raises(ServerRefused, match=r"does not want us: .* there are 4 clients already"):
        connect_or_start(server.path)  # and starts none: one is there
    for raw in many:
        raw.close()
    assert eventually(lambda: is_welcome(server))
    assert server.count("clients_refused") >= 1


def is_welcome(server: Server) -> bool:
    try:
        with client(server):
            return True
    except ServerGone:
        return False


def test_ring_memory_is_bounded(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    with running_server(folder, ring_bytes=1 << 20) as server, client(server) as connection:
        handle_of(connection, CreateCq(seq=0, depth=1 << 13))
        with pytest.raises(ServerRefused, match="ring_bytes") as caught:
            connection.request(CreateCq(seq=0, depth=1 << 13))
        assert (caught.value.code, caught.value.errno) == ("limit", errno.ENOMEM)
        assert handle_of(connection, CreateCq(seq=0, depth=16)) > 0


@pytest.mark.parametrize(
    ("dtype", "shape", "strides", "offset"),
    [
        ("|u1", [4097], [1], 0),
        ("|u1", [4096], [1], 1),
        ("|u1", [4096], [1], -1),
        ("<f8", [2], [-8], 0),
        ("<f8", [1 << 62, 1 << 62], [1 << 62, 1], 0),
        ("<f8", [2], [8, 8], 0),
        ("<f8", [-1], [8], 0),
        ("|O", [1], [8], 0),
        ("<q9", [1], [8], 0),
        ("f8,f8", [1], [16], 0),
        ("", [1], [1], 0),
        ("x" * 5000, [1], [1], 0),
    ],
)
def test_an_array_that_does_not_fit_its_region_is_not_published(
    server: Server, dtype: str, shape: list[int], strides: list[int], offset: int
) -> None:
    with client(server) as connection:
        mr = register(connection, handle_of(connection, AllocPd(seq=0)), 8192, 4096).mr
        with pytest.raises(ServerRefused) as caught:
            connection.request(Publish(seq=0, mr=mr, dtype=dtype, shape=shape, strides=strides, offset=offset))
        assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("dtype", "shape", "strides", "offset"),
    [
        ("|u1", [4096], [1], 0),
        ("<f8", [512], [-8], 4088),
        ("<f8", [16, 32], [8, 128], 0),
        ("<M8[ns]", [512], [8], 0),
        ("|V16", [256], [16], 0),
        ("<f8", [], [], 4088),
        ("<f8", [0, 9], [72, 8], 4096),
        ("<f8", [1 << 40], [0], 0),
    ],
)
def test_any_array_inside_its_region_is_published(
    server: Server, dtype: str, shape: list[int], strides: list[int], offset: int
) -> None:
    with client(server) as connection:
        mr = register(connection, handle_of(connection, AllocPd(seq=0)), 8192, 4096).mr
        reply, _ = connection.request(Publish(seq=0, mr=mr, dtype=dtype, shape=shape, strides=strides, offset=offset))
        assert isinstance(reply, Published)
        assert len(reply.token) == 32
        connection.request(Withdraw(seq=0, share=reply.share))
