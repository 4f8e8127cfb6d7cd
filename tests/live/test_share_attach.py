"""Sharing and attaching: who gets in, and what both ends see when the other goes."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import read_until_it_fails

import nopin
from nopin.control.url import ShareUrl
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer
from nopin.verbs import device as device_module

PeerProcess = Callable[..., Child]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with LocalServer(tmp_path_factory.mktemp("server") / "server.sock") as running:
        yield running


@pytest.fixture
def device(server: LocalServer) -> Iterator[nopin.Device]:
    with nopin.Device(str(server.socket_path)) as opened:
        yield opened


def own(line: Line[Any], server: str, n: int) -> None:
    """Be the owner of an array of n 8-byte numbers; unmap, withdraw or end as told."""
    device = nopin.Device(server)
    memory = mmap.mmap(-1, 8 * n)
    numbers = np.frombuffer(memory, np.int64)
    numbers[:] = np.arange(n)
    share = device.share(numbers, access="rwa")
    line.send(share.url)
    while (word := line.receive()) != "end":
        if word == "withdraw":
            share.close()
        elif word == "hole":
            madvise_hole(numbers.ctypes.data + 8 * n // 2, mmap.PAGESIZE)
        else:
            line.send(numbers[: int(word)].tolist())
            continue
        line.send("done")


def madvise_hole(address: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(length))
    assert result == 0, os.strerror(ctypes.get_errno())


def test_another_process_reads_and_writes_in_place(
    server: LocalServer, device: nopin.Device, peer_process: PeerProcess
) -> None:
    owner = peer_process(own, str(server.socket_path), 1000)
    with nopin.attach(owner.line.receive(), device=device) as remote:
        assert remote[...].tolist() == list(range(1000))
        remote[2:4] = [-2, -3]
        assert remote.fetch_add(0, 100) == 0
    assert owner.ask("5") == [100, 1, -2, -3, 4]


@pytest.mark.parametrize(
    "buffer",
    [bytearray(b"12345678"), array.array("B", b"12345678"), np.frombuffer(bytearray(b"12345678"), "u1")],
    ids=lambda b: type(b).__name__,
)
def test_anything_with_a_buffer_can_be_shared(device: nopin.Device, buffer: Any) -> None:
    with device.share(buffer) as share, nopin.attach(share.url, device=device) as remote:
        assert bytes(remote[2:5]) == b"345"
        remote[0] = ord("X")
    assert bytes(buffer) == b"X2345678"


def test_a_shared_buffer_cannot_be_resized_until_closed(device: nopin.Device) -> None:
    buffer = bytearray(64)
    with device.share(buffer), pytest.raises(BufferError):
        buffer.extend(b"more")
    buffer.extend(b"more")


def test_a_shared_array_lives_on_when_its_owner_forgets_it(device: nopin.Device) -> None:
    url = device.share(np.full(1 << 16, 7, np.uint16)).url
    with nopin.attach(url, device=device) as remote:
        assert (remote[...] == 7).all()


def test_constant_bytes_are_shared_for_reading_only(device: nopin.Device) -> None:
    with pytest.raises(nopin.UsageError, match="read-only"):
        device.share(b"constant")
    with device.share(b"constant", access="r") as share, nopin.attach(share.url, device=device) as remote:
        assert remote[...].tobytes() == b"constant"


def test_an_address_and_a_length_can_be_shared(device: nopin.Device) -> None:
    numbers = np.arange(100, dtype=np.uint8)
    with (
        device.share(numbers.ctypes.data + 10, 20) as share,
        nopin.attach(share.url, device=device) as remote,
    ):
        assert remote[...].tolist() == list(range(10, 30))


def test_the_whole_process_is_indexed_by_its_own_addresses(device: nopin.Device) -> None:
    numbers = np.arange(5000, dtype=np.uint16)
    at = numbers.ctypes.data
    with device.share() as share, nopin.attach(share.url, device=device) as remote:
        assert remote[at : at + numbers.nbytes].view(np.uint16).tolist() == numbers.tolist()
        remote[at : at + 2] = [1, 1]
        assert numbers[0] == 257
        with pytest.raises(nopin.WorkError, match="REM_ACCESS_ERR"):
            remote[4096]


def test_a_sparse_terabyte_is_shared_at_once(device: nopin.Device) -> None:
    size = 1 << 40
    huge = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    with device.share(huge) as share, nopin.attach(share.url, device=device) as remote:
        remote[size - 3 :] = [1, 2, 3]
        assert remote[size - 4 :].tolist() == [0, 1, 2, 3]
    assert huge[size - 3 :] == b"\1\2\3"


@pytest.mark.parametrize("discipline", ["on-demand", "short-term"])
def test_disciplines_give_the_same_bytes(device: nopin.Device, discipline: str) -> None:
    numbers = np.arange(100_000)
    with device.share(numbers, discipline=discipline) as share:
        assert share.region.discipline.name.lower().replace("_", "-") == discipline
        with nopin.attach(share.url, device=device) as remote:
            assert np.array_equal(remote[...], np.arange(100_000))
            remote[::2] = 0
    assert numbers[::2].sum() == 0


def test_a_wrong_token_is_refused(device: nopin.Device) -> None:
    share = device.share(np.zeros(4))
    right = ShareUrl.parse(share.url)
    wrong = ShareUrl(right.host, right.port, right.share, bytes(32))
    unknown = ShareUrl(right.host, right.port, "unknown", right.token)
    for url in (wrong, unknown):
        with pytest.raises(nopin.AttachRefused, match="no such share, or wrong token") as caught:
            nopin.attach(str(url), device=device)
        assert caught.value.code == "token"


def test_nobody_there_is_a_peer_error(device: nopin.Device) -> None:
    url = ShareUrl("127.0.0.1", 1, "share", bytes(32))
    with pytest.raises(nopin.PeerError, match="still running"):
        nopin.attach(str(url), device=device)


def test_a_silent_peer_is_given_up_in_time(device: nopin.Device) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = ShareUrl("127.0.0.1", silent.getsockname()[1], "share", bytes(32))
        with pytest.raises(nopin.PeerError, match="failed"):
            nopin.attach(str(url), device=device, timeout=0.2)


def test_a_text_that_is_no_url_is_a_usage_error(device: nopin.Device) -> None:
    with pytest.raises(nopin.UsageError, match="nopin://HOST:PORT"):
        nopin.attach("http://example.org", device=device)
    with device.share(np.zeros(4)) as share, pytest.raises(nopin.UsageError, match=r"share\.url"):
        nopin.attach(share, device=device)  # type: ignore[arg-type]  # the wrong move


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf"), None, "5"])
def test_a_timeout_that_is_no_time_is_a_usage_error(device: nopin.Device, timeout: Any) -> None:
    with (
        device.share(np.zeros(4)) as share,
        pytest.raises(nopin.UsageError, match=r"give seconds|of seconds"),
    ):
        nopin.attach(share.url, device=device, timeout=timeout)


@pytest.mark.parametrize("reconnect", [float("nan"), "5"])
def test_a_patience_that_is_no_time_is_said_before_it_is_needed(device: nopin.Device, reconnect: Any) -> None:
    with device.share(np.zeros(4)) as share, pytest.raises(nopin.UsageError, match="number of seconds"):
        nopin.attach(share.url, device=device, reconnect=reconnect)
    with pytest.raises(nopin.UsageError, match="number of seconds"):
        nopin.Device(reconnect=reconnect)


@pytest.mark.parametrize("access", ["", "l", nopin.Access.NONE])
def test_a_share_that_grants_nothing_is_refused(device: nopin.Device, access: str | nopin.Access) -> None:
    with pytest.raises(nopin.UsageError, match="grants peers nothing"):
        device.share(np.zeros(4), access=access)


def test_what_is_printed_of_an_object_says_that_it_was_closed(device: nopin.Device) -> None:
    share = device.share(np.zeros(4))
    assert "closed" not in repr(share)
    share.close()
    assert repr(share).endswith("(was closed)>")


def test_a_withdrawn_share_says_so_at_the_next_operation(device: nopin.Device) -> None:
    share = device.share(np.zeros(10))
    with nopin.attach(share.url, device=device) as remote:
        assert remote[0] == 0
        share.close()
        for _ in range(2):
            with pytest.raises(nopin.RegionGone, match="withdrawn"):
                remote[0]
        with pytest.raises(nopin.AttachRefused):
            nopin.attach(share.url, device=device)


def test_an_owner_that_ends_is_named_as_the_cause(
    server: LocalServer, device: nopin.Device, peer_process: PeerProcess
) -> None:
    owner = peer_process(own, str(server.socket_path), 1000)
    with nopin.attach(owner.line.receive(), device=device) as remote:
        owner.kill()
        with pytest.raises(nopin.RegionGone, match="owner exited"):
            read_until_it_fails(remote)


def test_who_waits_is_woken_when_the_owner_ends(
    server: LocalServer, device: nopin.Device, peer_process: PeerProcess
) -> None:
    owner = peer_process(own, str(server.socket_path), 1 << 22)
    with nopin.attach(owner.line.receive(), device=device) as remote:
        operations = [remote.read_async(...) for _ in range(20)]
        threading.Timer(0.02, owner.kill).start()
        errors = [operation.exception(timeout=20) for operation in operations]
    assert isinstance(errors[-1], nopin.RegionGone)
    assert all(error is None or isinstance(error, nopin.RegionGone) for error in errors)


def test_a_killed_peer_server_is_noticed_at_once(
    tmp_path: Path, device: nopin.Device, peer_process: PeerProcess
) -> None:
    with LocalServer(tmp_path / "theirs.sock") as theirs:
        owner = peer_process(own, str(theirs.socket_path), 1 << 22)
        with nopin.attach(owner.line.receive(), device=device, reconnect=0.0) as remote:
            operations = [remote.read_async(...) for _ in range(20)]
            theirs.kill()
            began = time.monotonic()
            with pytest.raises(nopin.RegionGone, match="server"):
                operations[-1].result(timeout=20)
            assert time.monotonic() - began < 20
            with pytest.raises(nopin.RegionGone):
                remote[0]


def test_a_killed_own_server_is_noticed_at_once(tmp_path: Path, device: nopin.Device) -> None:
    share = device.share(np.zeros(1 << 22))
    with LocalServer(tmp_path / "ours.sock") as ours, nopin.Device(str(ours.socket_path)) as user:
        remote = nopin.attach(share.url, device=user, reconnect=0.0)
        operations = [remote.read_async(...) for _ in range(20)]
        ours.kill()
        with pytest.raises(nopin.ServerGone, match="went away"):
            operations[-1].result(timeout=20)
        with pytest.raises(nopin.ServerGone):
            remote[0]


def test_a_hole_gives_an_exact_error_and_ends_the_connection(
    server: LocalServer, device: nopin.Device, peer_process: PeerProcess
) -> None:
    n = 1 << 14
    owner = peer_process(own, str(server.socket_path), n)
    url = owner.line.receive()
    with nopin.attach(url, device=device) as remote:
        assert owner.ask("hole") == "done"
        assert remote[: n // 2].tolist() == list(range(n // 2)), "the neighbours are as before"
        with pytest.raises(nopin.WorkError, match="unmapped, protected or withdrew") as caught:
            remote[n // 2]
        assert caught.value.status == nopin.WcStatus.REM_ACCESS_ERR
        with pytest.raises(nopin.WorkError, match="attach again"):
            remote[0]
    with nopin.attach(url, device=device) as again:
        assert again[0] == 0


def test_the_default_device_is_made_once(
    server: LocalServer, device: nopin.Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "nopin"
    folder.mkdir(mode=0o700)
    (folder / "server.sock").symlink_to(server.socket_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    share = device.share(np.arange(5))
    with nopin.attach(share.url) as one, nopin.attach(share.url) as two:
        assert one[4] == two[4] == 4
        assert one.device is two.device


def test_threads_that_attach_at_once_make_one_default_device(
    device: nopin.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nopin.Device] = []

    def make() -> nopin.Device:
        time.sleep(0.02)  # for the others to look meanwhile
        made.append(nopin.Device(device.lifeline.current.control.path))
        return made[-1]

    monkeypatch.setattr(device_module, "_default", [])
    monkeypatch.setattr(device_module, "Device", make)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: device_module.default_device(), range(8)))
    assert found == {made[0]}
    assert len(made) == 1
    made[0].close()


def test_a_dropped_remote_array_gives_its_queue_pair_back(device: nopin.Device) -> None:
    share = device.share(np.arange(5))

    def n_pairs() -> int:
        return sum(row["kind"] == "qp" and row["comm"] != "peer" for row in device.stat())

    before = n_pairs()
    for _ in range(20):
        assert nopin.attach(share.url, device=device)[1] == 1
    assert n_pairs() - before <= 1


def test_garbage_in_a_cycle_gives_its_queue_pair_back(device: nopin.Device) -> None:
    share = device.share(np.arange(5))
    holder: dict[str, Any] = {"array": nopin.attach(share.url, device=device)}
    holder["self"] = holder
    del holder
    gc.collect()
    assert not [row for row in device.stat() if row["kind"] == "qp" and row["comm"] != "peer"]
