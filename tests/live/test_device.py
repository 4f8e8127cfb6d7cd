"""Devices: finding or starting a server, forking, ending."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import PATIENCE_S, eventually

import nopin
from nopin.lab.child import Child
from nopin.lab.line import Line
from nopin.lab.servers import LocalServer
from nopin.linux import memfd
from nopin.verbs import child_server

PeerProcess = Callable[..., Child]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with LocalServer(tmp_path_factory.mktemp("server") / "server.sock") as running:
        yield running


@pytest.fixture
def device(server: LocalServer) -> Iterator[nopin.Device]:
    with nopin.Device(str(server.socket_path)) as opened:
        yield opened


def use_default(line: Line[Any]) -> None:
    """Open the default device, say whose server it is, stay until told to go."""
    with nopin.Device() as device:
        line.send(device.info.server_pid)
        line.receive()


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_processes_that_start_at_once_share_one_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer_process: PeerProcess
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    users = [peer_process(use_default) for _ in range(3)]
    pids = {user.line.receive(30.0) for user in users}
    assert len(pids) == 1
    for user in users:
        user.kill()
    (pid,) = pids
    assert eventually(lambda: ended(pid)), "a server started as a child ends with its parent"


def test_a_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "nopin"
    folder.mkdir(mode=0o700)
    (folder / "server.sock").mkdir()
    with pytest.raises(nopin.ServerError, match=r"did not start: .+log"):
        nopin.Device()


def test_a_server_that_came_first_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a killed server's successor and a new program's server start at once."""
    path = tmp_path / "run" / "server.sock"

    def lose(_path: Path) -> None:
        running.append(LocalServer(path))
        raise nopin.ServerError("a device server already serves it")

    running: list[LocalServer] = []
    monkeypatch.setattr(child_server, "_start_child", lose)
    with closing(child_server.connect_or_start(path)) as session:
        assert session.welcome.server_pid == running[0].pid
    running[0].close()


def test_a_directory_open_to_others_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "nopin").mkdir(mode=0o755)
    with pytest.raises(nopin.ServerError, match="chmod 700"):
        nopin.Device()


def test_nobody_listening_is_said(tmp_path: Path) -> None:
    with pytest.raises(nopin.ServerGone, match="no device server"):
        nopin.Device(str(tmp_path / "none.sock"))


def test_a_lack_of_descriptors_is_said_and_ends_no_connection(device: nopin.Device) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory = np.arange(10)
    with device.share(memory) as share, nopin.attach(share.url, device=device) as remote:
        next_fd = os.dup(0)
        os.close(next_fd)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_fd, limits[1]))
            with pytest.raises(nopin.ServerError, match="too many open files; raise its limit") as caught:
                device.create_channel()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert not isinstance(caught.value, nopin.ServerGone)
        assert (remote[...] == memory).all()
        device.create_channel().close()


def test_what_is_half_made_when_memory_runs_out_is_unmade(
    device: nopin.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "mmap")

    def n_objects() -> int:
        return len(device.stat())

    pd, cq = device.alloc_pd(), device.create_cq(8)
    before = n_objects()
    with monkeypatch.context() as patched:
        patched.setattr(memfd, "map_array", refuse)
        for make in (lambda: device.create_cq(8), lambda: pd.create_qp(cq)):
            with pytest.raises(OSError, match="mmap"):
                make()
    gc.collect()
    assert n_objects() == before
    device.create_cq(8).close()
    pd.create_qp(cq).close()


def test_info_tells_what_the_server_is(device: nopin.Device, server: LocalServer) -> None:
    info = device.info
    assert info.server_pid == server.pid
    assert len(info.gid) == 16
    assert info.mtu in (256, 512, 1024, 2048, 4096)
    assert info.limits["qps"] > 0


def test_closing_twice_is_fine_and_use_afterwards_is_refused(server: LocalServer) -> None:
    device = nopin.Device(str(server.socket_path))
    device.close()
    device.close()
    for use in (device.stat, device.events, device.alloc_pd, device.create_cq, device.share):
        with pytest.raises(nopin.Closed):
            use()


def test_closing_a_device_closes_all_it_has(server: LocalServer, device: nopin.Device) -> None:
    def mine(kind: str) -> int:
        return sum(row["kind"] == kind for row in device.stat())

    before = {kind: mine(kind) for kind in ("mr", "qp", "cq", "client")}
    other = nopin.Device(str(server.socket_path))
    share = other.share(np.zeros(10))
    remote = nopin.attach(share.url, device=other)
    pd = other.alloc_pd()
    region = pd.register(bytearray(100), access="l")
    assert mine("mr") > before["mr"]
    other.close()
    assert all(dead.closed for dead in (share, remote, pd, region))
    assert eventually(lambda: before == {kind: mine(kind) for kind in before})


def test_a_dropped_object_is_closed_at_the_next_request(device: nopin.Device) -> None:
    def n_queues() -> int:
        return sum(row["kind"] == "cq" for row in device.stat())

    before = n_queues()
    device.create_cq(16)
    assert n_queues() == before


def test_after_fork_the_child_is_told_and_the_parent_goes_on(device: nopin.Device) -> None:
    numbers = np.arange(1000)
    share = device.share(numbers)
    remote = nopin.attach(share.url, device=device)
    under_way = remote.read_async(...)
    pid = os.fork()
    if pid == 0:
        os._exit(child_is_told(device, remote, share, under_way))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert np.array_equal(under_way.result(10), numbers)
    remote[5] = -1
    assert numbers[5] == remote[5] == -1


def child_is_told(
    device: nopin.Device, remote: nopin.RemoteArray, share: nopin.Share, under_way: nopin.Operation[Any]
) -> int:
    uses: list[Callable[[], object]] = [
        device.stat,
        remote.__array__,
        device.alloc_pd,
        lambda: under_way.result(1),
    ]
    for use in uses:
        try:
            use()
        except nopin.Closed as error:
            if "new Device" not in str(error):
                return 1
        else:
            return 2
    for each in (share, remote, device):
        each.close()
    gc.collect()
    return 0


def test_a_forked_child_can_make_its_own_device(server: LocalServer, device: nopin.Device) -> None:
    share = device.share(np.arange(100))
    pid = os.fork()
    if pid == 0:
        with nopin.Device(str(server.socket_path)) as own, nopin.attach(share.url, device=own) as remote:
            os._exit(0 if remote[99] == 99 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.needs_userfaultfd
def test_changes_of_shared_memory_arrive_as_events(device: nopin.Device) -> None:
    if not device.info.watching:
        pytest.skip("userfaultfd events are not allowed here (nopin doctor says why)")
    memory = mmap.mmap(-1, 1 << 20)
    region = device.share(memory).region
    memory.madvise(mmap.MADV_DONTNEED, 4096, 8192)
    events = device.events(timeout=PATIENCE_S)
    assert [(event.kind, event.target, event.cause) for event in events] == [
        (nopin.AsyncEventType.REGION_INVALIDATED, region, "remove")
    ]
    assert (events[0].start - region.address, events[0].end - region.address) == (4096, 12288)
    place = f"[{events[0].start:#x}, {events[0].end:#x})"
    assert str(events[0]) == f"REGION_INVALIDATED: remove {place}, number {events[0].generation} of {region!r}"


def test_a_server_that_dies_is_noticed_everywhere(tmp_path: Path) -> None:
    with LocalServer(tmp_path / "mortal.sock") as mortal:
        device = nopin.Device(str(mortal.socket_path), reconnect=0.0)
        share = device.share(np.zeros(10))
        cq = device.create_cq(16)
        mortal.kill()
        with pytest.raises(nopin.ServerGone):
            cq.wait(timeout=PATIENCE_S)
        with pytest.raises(nopin.ServerGone):
            device.stat()
        share.close()
        device.close()


def test_a_program_that_just_ends_ends_well(server: LocalServer) -> None:
    program = (
        "import sys, numpy, nopin\n"
        "device = nopin.Device(sys.argv[1])\n"
        "remote = nopin.attach(device.share(numpy.arange(1 << 20)).url, device=device)\n"
        "later = remote.read_async(...)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", program, str(server.socket_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_importing_is_quick_in_what_it_loads() -> None:
    program = "import sys, nopin; print(*(set(sys.modules) & {'asyncio', 'scipy', 'rich', 'click', 'nopin.server'}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.strip() == ""


def test_an_interrupt_ends_a_wait_and_harms_nothing(device: nopin.Device) -> None:
    cq = device.create_cq(16)
    before = signal.signal(signal.SIGUSR1, _interrupt)
    try:
        pid = os.getpid()
        killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(.2); os.kill({pid}, 10)"])
        with pytest.raises(KeyboardInterrupt):
            cq.wait(timeout=PATIENCE_S)
        killer.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert cq.wait(timeout=0.01) == []


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
