"""What transfers under way end with when a region, a process or a server goes; and what is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_memory import Pages, anonymous
from serving import eventually
from verbs_pair import PATHS, PATIENCE_S, WIRE, End, Servers, connected, running_servers

from nopin import (
    Device,
    NopinError,
    PeerError,
    QpEndpoint,
    RegionGone,
    RemoteArray,
    SendWr,
    ServerGone,
    Share,
    WcStatus,
    WorkError,
    WrOpcode,
    attach,
)
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer

LENGTH = 4 << 20
OLD, NEW = 0x5A, 0xEE
SHORT_TIMEOUT, FEW_RETRIES = 10, 2  # 4.2 ms each: a peer that is gone is noticed soon


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running_servers(tmp_path_factory.mktemp("life")) as running:
        yield running


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pages() -> Iterator[Pages]:
    with anonymous(LENGTH // 4096) as pages:
        pages.array()[:] = OLD
        yield pages


# --- deregistration


@pytest.mark.parametrize("n_before", [0, 1, 5])
def test_reads_under_way_at_deregistration_bring_right_bytes_or_an_access_error(
    servers: Servers, path: str, pages: Pages, n_before: int
) -> None:
    """Once deregistration returns, not one byte of what the memory is used for next is seen."""
    n, size = 32, LENGTH // 32
    with anonymous(LENGTH // 4096) as sink, connected(servers, path) as pair:
        region = pair.owner.register(pages.address, LENGTH)
        wrs = [
            SendWr(
                WrOpcode.RDMA_READ,
                [pair.peer.sge(sink.address + at, size)],
                at,
                remote_address=pages.address + at,
                rkey=region.rkey,
            )
            for at in range(0, LENGTH, size)
        ]
        pair.peer.qp.post_send(wrs)
        completions = pair.peer.cq.wait(n_before, PATIENCE_S)
        region.close()
        pages.array()[:] = NEW
        completions += pair.peer.cq.wait(n - n_before, PATIENCE_S)
        check_end([wc.status for wc in completions], n)
        for wc in completions:
            arrived = sink.get(wc.wr_id, size)
            assert arrived == bytes([OLD]) * size or (wc.status and set(arrived) <= {0, OLD})


@pytest.mark.parametrize("n_before", [0, 1, 5])
def test_no_write_lands_once_deregistration_has_returned(
    servers: Servers, path: str, pages: Pages, n_before: int
) -> None:
    n, size = 32, LENGTH // 32
    with anonymous(LENGTH // 4096) as source, connected(servers, path) as pair:
        region = pair.owner.register(pages.address, LENGTH)
        wrs = [
            SendWr(
                WrOpcode.RDMA_WRITE,
                [pair.peer.sge(source.address + at, size)],
                at,
                remote_address=pages.address + at,
                rkey=region.rkey,
            )
            for at in range(0, LENGTH, size)
        ]
        pair.peer.qp.post_send(wrs)
        completions = pair.peer.cq.wait(n_before, PATIENCE_S)
        region.close()
        left = pages.get(0, LENGTH)
        pages.array()[:] = NEW
        completions += pair.peer.cq.wait(n - n_before, PATIENCE_S)
        check_end([wc.status for wc in completions], n)
        assert set(pages.get(0, LENGTH)) == {NEW}
        for wc in completions:
            assert wc.status or left[wc.wr_id : wc.wr_id + size] == bytes(size)


def check_end(statuses: list[WcStatus], n: int) -> None:
    """Successes, then perhaps one access error, then flushed work: nothing else, and in this order."""
    n_good = statuses.count(WcStatus.SUCCESS)
    n_bad = min(1, n - n_good)
    expected = [WcStatus.SUCCESS] * n_good + [WcStatus.REM_ACCESS_ERR] * n_bad
    assert statuses == expected + [WcStatus.WR_FLUSH_ERR] * (n - n_good - n_bad)


def test_attached_peers_get_right_bytes_until_they_are_told_that_the_share_ended(servers: Servers, path: str) -> None:
    for n_before in range(6):
        array = np.full(LENGTH, OLD, np.uint8)
        with Device(servers.owner_path()) as ours, Device(servers.peer_path(path)) as theirs:
            share = ours.share(array)
            with attach(share.url, device=theirs) as remote:
                operations = [remote.read_async() for _ in range(8)]
                for operation in operations[:n_before]:
                    operation.result(PATIENCE_S)
                share.close()
                array[:] = NEW
                for operation in operations:
                    outcome = operation.exception(PATIENCE_S)
                    assert outcome is None or isinstance(outcome, RegionGone)
                    assert outcome is not None or (operation.result() == OLD).all()
                with pytest.raises(RegionGone, match="withdrawn"):
                    remote[0]


# --- processes


def own(line: Line[Any], server: str, address_of_peer: dict[str, Any] | None) -> None:
    """Share memory, by a remote array and by verbs, until killed."""
    with Device(server) as device, anonymous(LENGTH // 4096) as pages:
        pages.array()[:] = OLD
        share = device.share(pages.address, LENGTH)
        if address_of_peer is None:
            line.send(share.url)
        else:
            end = End(device)
            end.qp.connect(endpoint_of(address_of_peer))
            region = end.register(pages.address, LENGTH)
            line.send([as_message(end.qp.endpoint), pages.address, region.rkey])
        line.receive()


def as_message(endpoint: QpEndpoint) -> dict[str, Any]:
    return {"gid": endpoint.gid, "port": endpoint.port, "qpn": endpoint.qpn, "psn": endpoint.psn}


def endpoint_of(message: dict[str, Any]) -> QpEndpoint:
    return QpEndpoint(**message)


def first_failure(remote: RemoteArray, end_it: Callable[[], None]) -> NopinError:
    """Keep reading and end the other side in the midst of it; until then all bytes are right."""
    under_way = [remote.read_async() for _ in range(4)]
    under_way[0].result(PATIENCE_S)
    end_it()
    try:
        for operation in under_way:
            assert (operation.result(PATIENCE_S) == OLD).all()
        while True:
            assert (remote[...] == OLD).all()
    except NopinError as failure:
        return failure


def first_bad_status(end: End, wr: SendWr, end_it: Callable[[], None]) -> WcStatus:
    """The same by verbs."""
    end.qp.post_send([wr] * 8)
    end_it()
    while (completion := end.next_completion()).status is WcStatus.SUCCESS:
        end.qp.post_send(wr)
    return completion.status


@contextlib.contextmanager
def remote_owner(owner_server: str, peer_server: str) -> Iterator[tuple[Child, RemoteArray]]:
    """An owner in a process of its own and an array of it."""
    with (
        Child(own, owner_server, None) as owner,
        Device(peer_server) as device,
        attach(owner.line.receive(PATIENCE_S), device=device, reconnect=0.0) as remote,
    ):
        yield owner, remote


@contextlib.contextmanager
def verbs_owner(owner_server: str, peer_server: str) -> Iterator[tuple[Child, End, SendWr]]:
    """An owner in a process of its own, an end connected to it and a READ of its memory."""
    with Device(peer_server) as device, anonymous(LENGTH // 4096) as sink:
        end = End(device)
        with Child(own, owner_server, as_message(end.qp.endpoint)) as owner:
            theirs, address, rkey = owner.line.receive(PATIENCE_S)
            end.qp.connect(endpoint_of(theirs), timeout=SHORT_TIMEOUT, retry_cnt=FEW_RETRIES)
            sge = end.sge(sink.address, LENGTH)
            yield owner, end, SendWr(WrOpcode.RDMA_READ, [sge], remote_address=address, rkey=rkey)


def test_an_attached_peer_learns_that_the_owner_was_killed(servers: Servers, path: str) -> None:
    with remote_owner(servers.owner_path(), servers.peer_path(path)) as (owner, remote):
        failure = first_failure(remote, owner.kill)
        assert isinstance(failure, RegionGone)
        with pytest.raises(RegionGone, match="gone"):
            remote[0]


def test_a_queue_pair_whose_peer_was_killed_exceeds_its_retries(servers: Servers, path: str) -> None:
    with verbs_owner(servers.owner_path(), servers.peer_path(path)) as (owner, end, read):
        status = first_bad_status(end, read, owner.kill)
        # An access error if the memory went before the queue pair, as for any other access to it.
        assert status in (WcStatus.RETRY_EXC_ERR, WcStatus.REM_ACCESS_ERR)


def test_a_killed_process_leaves_nothing_behind_in_the_server(servers: Servers) -> None:
    with Device(servers.owner_path()) as watching:
        before = kinds(watching)
        with verbs_owner(servers.owner_path(), servers.peer_path(WIRE)) as (owner, _, _):
            assert rows_of(watching, owner.pid)
            owner.kill()
            assert eventually(lambda: not rows_of(watching, owner.pid))
        assert eventually(lambda: kinds(watching) == before)


def test_a_process_that_ends_leaves_nothing_behind_in_the_server(servers: Servers, path: str) -> None:
    with Device(servers.owner_path()) as watching:
        before = kinds(watching)
        with remote_owner(servers.owner_path(), servers.peer_path(path)) as (owner, _):
            assert rows_of(watching, owner.pid)
        assert eventually(lambda: kinds(watching) == before)


def rows_of(device: Device, pid: int) -> list[dict[str, Any]]:
    return [row for row in device.stat() if row.get("pid") == pid]


def kinds(device: Device) -> list[str]:
    return sorted(str(row["kind"]) for row in device.stat())


# --- servers


@contextlib.contextmanager
def own_server(folder: Path) -> Iterator[LocalServer]:
    """A server that the test may kill or stop."""
    with LocalServer(folder / "server.sock") as server:
        try:
            yield server
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.pid, signal.SIGCONT)


def test_clients_of_a_killed_server_are_told_so(tmp_path: Path) -> None:
    with own_server(tmp_path) as server, remote_owner(str(server.socket_path), str(server.socket_path)) as (_, remote):
        failure = first_failure(remote, server.kill)
        assert isinstance(failure, ServerGone)
        with pytest.raises(ServerGone):
            remote[0]


def test_verbs_clients_of_a_killed_server_are_told_so(tmp_path: Path) -> None:
    with own_server(tmp_path) as server:
        socket_path = str(server.socket_path)
        with verbs_owner(socket_path, socket_path) as (_, end, read), pytest.raises(ServerGone):
            first_bad_status(end, read, server.kill)


def test_owner_memory_outlives_a_killed_server_and_the_owner_goes_on(tmp_path: Path, pages: Pages) -> None:
    """Also with changes of watched memory, which wait for the server while it lives."""
    with own_server(tmp_path) as server:
        device = Device(str(server.socket_path), reconnect=0.0)
        share = device.share(pages.address, LENGTH)
        server.kill()
        pages.unmap(3)
        pages.map_fresh(3)
        assert pages.get(0, 4096) == bytes([OLD]) * 4096
        with pytest.raises(ServerGone):
            device.share(pages.address, LENGTH)
        share.close()
        device.close()


def test_peers_of_a_killed_server_are_told_that_the_region_is_gone(servers: Servers, tmp_path: Path) -> None:
    with (
        own_server(tmp_path) as server,
        remote_owner(str(server.socket_path), servers.peer_path(WIRE)) as (_, remote),
    ):
        assert isinstance(first_failure(remote, server.kill), RegionGone)


def test_queue_pairs_to_a_killed_server_exceed_their_retries(servers: Servers, tmp_path: Path) -> None:
    with (
        own_server(tmp_path) as server,
        verbs_owner(str(server.socket_path), servers.peer_path(WIRE)) as (_, end, read),
    ):
        assert first_bad_status(end, read, server.kill) is WcStatus.RETRY_EXC_ERR


def test_a_peer_that_falls_silent_exceeds_the_retries(servers: Servers, tmp_path: Path) -> None:
    """A stopped server is what a cut network looks like: connections stand, nothing answers."""
    with own_server(tmp_path) as server:

        def fall_silent() -> None:
            os.kill(server.pid, signal.SIGSTOP)

        with verbs_owner(str(server.socket_path), servers.peer_path(WIRE)) as (_, end, read):
            assert first_bad_status(end, read, fall_silent) is WcStatus.RETRY_EXC_ERR
            os.kill(server.pid, signal.SIGCONT)
        with remote_owner(str(server.socket_path), servers.peer_path(WIRE)) as (_, remote):
            failure = first_failure(remote, fall_silent)
            assert isinstance(failure, WorkError)
            assert failure.status == WcStatus.RETRY_EXC_ERR
            os.kill(server.pid, signal.SIGCONT)


def test_nobody_listens_where_a_killed_server_published(tmp_path: Path, pages: Pages) -> None:
    with own_server(tmp_path) as server, Device(str(server.socket_path)) as device:
        share: Share = device.share(pages.address, LENGTH)
        server.kill()
        with own_server(tmp_path) as another, Device(str(another.socket_path)) as fresh, pytest.raises(PeerError):
            attach(share.url, device=fresh)
