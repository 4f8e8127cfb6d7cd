"""A program whose device server is killed goes on with the next: arenas, shares, accelerators; what is gone is said."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kernels_of_users
import numpy as np
import pytest
from serving import replace

from nopin import AsyncEventType, Closed, Device, SendWr, ServerGone, Sge, WrOpcode, attach
from nopin.lab.servers import LocalServer

N = 1 << 16


@pytest.fixture
def device(path: Path, servers: list[LocalServer]) -> Iterator[Device]:
    with Device(server=str(path)) as opened:
        yield opened


def rows(device: Device, kind: str) -> list[dict[str, object]]:
    return [row for row in device.stat() if row["kind"] == kind and row.get("pid") == os.getpid()]


def test_sharing_and_figures_go_on_and_shares_keep_their_url(
    device: Device, servers: list[LocalServer], peer: Device
) -> None:
    first, second = np.arange(N), np.arange(N) * 2
    share = device.share(first)
    url, region = share.url, share.region
    replace(servers)
    other = device.share(second)
    assert (share.url, share.region) == (url, region)
    assert [row["rkey"] for row in rows(device, "mr")] == [region.rkey, other.region.rkey]
    for each, array in ((share, first), (other, second)):
        with attach(each.url, device=peer) as remote:
            assert np.array_equal(remote[...], array)
    share.close()
    assert [row["rkey"] for row in rows(device, "mr")] == [other.region.rkey]
    with pytest.raises(Exception, match="no such share"):
        attach(url, device=peer)


def test_what_is_gone_is_told_by_one_event_and_raises(device: Device, servers: list[LocalServer]) -> None:
    pd, cq = device.alloc_pd(), device.create_cq(16)
    here, there = pd.create_qp(cq), pd.create_qp(cq)
    here.connect(there.endpoint)
    there.connect(here.endpoint)
    array = np.zeros(8)
    region = pd.register(array, access="rw")
    source = [Sge(region.address, 8, region.lkey)]
    write = SendWr(WrOpcode.RDMA_WRITE, source, remote_address=region.iova, rkey=region.rkey)
    replace(servers)
    (event,) = device.events()
    assert (event.kind, event.target, event.cause) == (AsyncEventType.SERVER_REPLACED, None, "")
    assert event.object_id == servers[-1].pid == device.info.server_pid
    assert device.events() == []
    for use in (
        here.query,
        lambda: here.post_send(write),
        lambda: cq.wait(timeout=1.0),
        lambda: pd.register(array, access="r"),
        lambda: device.alloc_pd().create_qp(cq),
    ):
        with pytest.raises(ServerGone):
            use()
    for each in (here, there, region, cq, pd):
        each.close()
    assert not rows(device, "qp") + rows(device, "cq")


@pytest.mark.needs_userfaultfd
def test_arenas_go_on_with_their_budget_and_can_be_prefetched_shared_and_closed(
    device: Device, servers: list[LocalServer], peer: Device
) -> None:
    n = 1 << 20
    device.set_budget("5MiB")
    arena = device.arena("16MiB", name="mine")
    array = arena.zeros(n, np.int64)
    array[:] = np.arange(n)
    replace(servers)
    assert device.prefetch(array[:512]).result(10.0) == 4096
    (row,) = rows(device, "arena")
    assert (row["name"], row["budget"], row["arena"]) == ("mine", 5 << 20, arena.handle)
    assert int(str(row["resident"])) <= 5 << 20
    with device.share(array) as share, attach(share.url, device=peer) as remote:
        assert np.array_equal(remote[...], np.arange(n))
    arena.set_budget("64KiB")
    fresh = device.zeros(n, np.int64)
    fresh += array
    assert np.array_equal(fresh, np.arange(n))
    del array
    arena.trim()
    arena.close()
    assert [each["name"] for each in rows(device, "arena")] == [f"pid {os.getpid()}"]
    del fresh


@pytest.mark.needs_userfaultfd
def test_an_arena_that_is_closed_while_there_is_no_server_is_closed_at_the_next(
    device: Device, servers: list[LocalServer]
) -> None:
    arena = device.arena("16MiB")
    arena.zeros(10)[:] = 1
    replace(servers)
    arena.close()
    assert not rows(device, "arena")


@pytest.mark.needs_userfaultfd
def test_accelerators_go_on_and_get_new_workers_and_arenas(device: Device, servers: list[LocalServer]) -> None:
    first = device.asarray(np.arange(N))
    before = device.accelerator()
    assert before.launch("sum", first).result(30.0) == N * (N - 1) // 2
    counters = device.zeros((64, 512), np.int64)
    under_way = before.launch(f"{kernels_of_users.__name__}.add_one", counters, 20, device.zeros(1, np.int64))
    replace(servers)
    under_way.result(30.0)
    assert (counters == 20).all()
    second = device.arena("16MiB").asarray(np.arange(N) * 2)  # the old worker maps it, too
    for accelerator in (before, device.accelerator()):
        assert accelerator.launch("sum", first).result(30.0) == N * (N - 1) // 2
        assert accelerator.launch("sum", second).result(30.0) == N * (N - 1)
    assert device.prefetch(second).result(10.0) == second.nbytes
    del first, second, counters, under_way


def test_a_share_closed_while_there_is_no_server_is_published_by_none(
    device: Device, servers: list[LocalServer], peer: Device
) -> None:
    closed, kept = device.share(np.arange(N)), device.share(np.arange(N))
    servers[-1].kill()
    url = closed.url
    closed.close()
    servers.append(LocalServer(servers[-1].socket_path, ["--takeover"]))
    with attach(kept.url, device=peer) as remote:
        assert remote[5] == 5
    with pytest.raises(Exception, match="no such share"):
        attach(url, device=peer)


def test_a_share_closed_when_the_successor_has_it_already_is_withdrawn_there(
    device: Device, servers: list[LocalServer], peer: Device
) -> None:
    share = device.share(np.arange(N))
    replace(servers)
    with attach(share.url, device=peer) as remote:
        share.close()
        with pytest.raises(Exception, match="withdrawn"):
            remote[0]


def test_shares_go_on_at_a_server_that_was_not_told_to_take_over(
    device: Device, servers: list[LocalServer], peer: Device
) -> None:
    share = device.share(np.arange(N))
    servers[-1].kill()
    servers.append(LocalServer(servers[-1].socket_path))
    device.stat()
    with attach(share.url, device=peer) as remote:
        assert remote[7] == 7


def test_shares_of_a_server_that_was_stopped_are_closed_and_named(device: Device, servers: list[LocalServer]) -> None:
    """It has withdrawn them, so its successor knows of none."""
    share = device.share(np.arange(N))
    said = repr(share)
    servers[-1].close()
    servers.append(LocalServer(servers[-1].socket_path))
    (event,) = device.events(timeout=5.0)
    assert (event.kind, event.cause) == (AsyncEventType.SERVER_REPLACED, said)
    assert share.closed
    assert share.region.closed
    with pytest.raises(Closed, match="was lost when its device server ended"):
        share.prefetch()
    share.close()
    with device.share(np.arange(N)) as again:
        assert not again.closed


def test_without_a_successor_it_is_waited_for_once(path: Path, servers: list[LocalServer]) -> None:
    with Device(server=str(path), reconnect=0.5) as device:
        servers[-1].kill()
        with pytest.raises(ServerGone, match="no other has come"):
            device.stat()
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(ServerGone):
                device.stat()
        assert time.monotonic() - began < 20 * 0.5
        servers.append(LocalServer(path))
        assert device.stat(), "a server that comes late is found all the same"


def test_threads_that_ask_while_servers_are_killed_are_all_answered(device: Device, servers: list[LocalServer]) -> None:
    share = device.share(np.arange(N))
    failures: list[Exception] = []
    ends = threading.Event()

    def ask() -> None:
        while not ends.is_set():
            try:
                device.share(np.arange(100)).close()
                device.stat()
            except Exception as failure:
                failures.append(failure)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        time.sleep(0.3)
        replace(servers)
    time.sleep(0.3)
    ends.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [row["rkey"] for row in rows(device, "mr")] == [share.region.rkey]


def test_a_forked_child_of_a_device_without_a_server_is_closed_and_disturbs_nobody(
    device: Device, servers: list[LocalServer]
) -> None:
    share = device.share(np.arange(N))
    servers[-1].kill()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            device.close()
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    servers.append(LocalServer(servers[-1].socket_path, ["--takeover"]))
    assert [row["rkey"] for row in rows(device, "mr")] == [share.region.rkey]
