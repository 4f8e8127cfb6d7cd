"""The verbs layer: regions, queues, work requests and their completions, as RDMA programs use them."""

from __future__ import annotations

import copy
import mmap
import os
import pickle
import resource
import select
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

import nopin
from nopin import Access, QpCaps, QpState, RecvWr, SendFlags, SendWr, Sge, WcOpcode, WcStatus, WrOpcode
from nopin.lab.servers import LocalServer
from nopin.verbs.buffers import memory_of
from nopin.verbs.pinned import pin

PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("servers")
    with LocalServer(folder / "one.sock") as one, LocalServer(folder / "two.sock") as two:
        yield str(one.socket_path), str(two.socket_path)


@pytest.fixture
def device(servers: tuple[str, str]) -> Iterator[nopin.Device]:
    with nopin.Device(servers[0]) as opened:
        yield opened


@dataclass
class End:
    """One end of a connection, with 64 KiB of memory."""

    device: nopin.Device
    pd: nopin.ProtectionDomain
    cq: nopin.CompletionQueue
    qp: nopin.QueuePair
    memory: np.ndarray[tuple[int], np.dtype[np.uint8]]
    region: nopin.MemoryRegion

    def sge(self, offset: int = 0, length: int = 64) -> Sge:
        return Sge(self.region.address + offset, length, self.region.lkey)

    def one(self) -> nopin.Wc:
        (wc,) = self.cq.wait(timeout=PATIENCE_S)
        return wc


def make_end(device: nopin.Device, caps: QpCaps | None = None) -> End:
    pd, cq = device.alloc_pd(), device.create_cq(256)
    memory = np.arange(1 << 16, dtype=np.uint32).astype(np.uint8)
    region = pd.register(memory, access="rwal")
    return End(device, pd, cq, pd.create_qp(cq, caps=caps), memory, region)


@pytest.fixture(params=["direct", "udp"])
def ends(servers: tuple[str, str], request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    second = servers[0 if request.param == "direct" else 1]
    with nopin.Device(servers[0]) as here, nopin.Device(second) as there:
        a, b = make_end(here), make_end(there)
        a.qp.connect(b.qp.endpoint)
        b.qp.connect(a.qp.endpoint)
        yield a, b


def test_send_and_receive(ends: tuple[End, End]) -> None:
    a, b = ends
    b.qp.post_recv(RecvWr([b.sge(0, 10), b.sge(100, 90)], wr_id=7))
    a.qp.post_send(SendWr(WrOpcode.SEND_WITH_IMM, [a.sge(1000, 60)], wr_id=8, imm=0xDEADBEEF))
    sent, got = a.one(), b.one()
    assert (sent.wr_id, sent.status, sent.opcode, sent.qp_num) == (8, WcStatus.SUCCESS, WcOpcode.SEND, a.qp.qpn)
    assert (got.wr_id, got.status, got.opcode) == (7, WcStatus.SUCCESS, WcOpcode.RECV)
    assert (got.byte_len, got.imm, got.wc_flags) == (60, 0xDEADBEEF, nopin.WcFlags.WITH_IMM)
    assert np.array_equal(b.memory[:10], a.memory[1000:1010])
    assert np.array_equal(b.memory[100:150], a.memory[1010:1060])


def test_inline_bytes_are_taken_when_posted(ends: tuple[End, End]) -> None:
    a, b = ends
    b.qp.post_recv(RecvWr([b.sge()]))
    a.qp.post_send(SendWr(WrOpcode.SEND, inline=b"inline"))
    assert b.one().byte_len == 6
    assert b.memory[:6].tobytes() == b"inline"


def test_one_sided_requests_in_one_post(ends: tuple[End, End]) -> None:
    a, b = ends
    b.memory[:8] = 0
    b.memory[8:16] = 0
    remote = b.region.iova
    quiet = SendFlags.NONE
    a.qp.post_send(
        [
            SendWr(
                WrOpcode.RDMA_WRITE,
                [a.sge(50, 3), a.sge(60, 2)],
                flags=quiet,
                remote_address=remote + 100,
                rkey=b.region.rkey,
            ),
            SendWr(WrOpcode.RDMA_READ, [a.sge(200, 5)], flags=quiet, remote_address=remote + 100, rkey=b.region.rkey),
            SendWr(
                WrOpcode.ATOMIC_FETCH_AND_ADD,
                [a.sge(304, 8)],
                flags=quiet,
                remote_address=remote,
                rkey=b.region.rkey,
                compare_add=5,
            ),
            SendWr(
                WrOpcode.ATOMIC_CMP_AND_SWP,
                [a.sge(400, 8)],
                wr_id=9,
                remote_address=remote,
                rkey=b.region.rkey,
                compare_add=5,
                swap=77,
            ),
        ]
    )
    assert a.one()[:3] == (9, WcStatus.SUCCESS, WcOpcode.COMP_SWAP)
    assert b.memory[100:105].tolist() == [50, 51, 52, 60, 61]
    assert a.memory[200:205].tolist() == [50, 51, 52, 60, 61]
    assert a.memory[304:312].view("<u8")[0] == 0
    assert a.memory[400:408].view("<u8")[0] == 5
    assert b.memory[:8].view("<u8")[0] == 77
    assert not a.cq.poll()


def test_many_requests_built_by_numpy(ends: tuple[End, End]) -> None:
    a, b = ends
    places = np.arange(100, dtype=np.uint64) * np.uint64(640)
    flags = np.zeros(100, np.uint8)
    flags[49::50] = SendFlags.SIGNALED
    a.qp.post_send_array(
        100,
        opcode=WrOpcode.RDMA_WRITE,
        local_address=places + np.uint64(a.region.address),
        length=8,
        lkey=a.region.lkey,
        remote_address=places[::-1] + np.uint64(b.region.iova),
        rkey=b.region.rkey,
        wr_id=np.arange(100),
        flags=flags,
    )
    assert [wc.wr_id for wc in a.cq.wait(2, timeout=PATIENCE_S)] == [49, 99]
    assert all(
        np.array_equal(b.memory[p : p + 8], a.memory[q : q + 8])
        for p, q in zip(range(0, 64000, 640), range(63360, -1, -640), strict=True)
    )


def test_many_completions_are_taken_as_an_array(ends: tuple[End, End]) -> None:
    a, b = ends
    write = SendWr(WrOpcode.RDMA_WRITE, [a.sge()], remote_address=b.region.iova, rkey=b.region.rkey)
    a.qp.post_send([replace(write, wr_id=number) for number in range(50)])
    taken: list[int] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while len(taken) < 50 and time.monotonic() < deadline_s:
        completions = a.cq.poll_array(20)
        assert len(completions) <= 20
        assert (completions["status"] == WcStatus.SUCCESS).all()
        taken += completions["wr_id"].tolist()
    assert taken == list(range(50))


def test_a_region_may_have_another_address_for_peers(ends: tuple[End, End]) -> None:
    a, b = ends
    moved = b.pd.register(b.memory, access="r", iova=0x1000)
    a.qp.post_send(SendWr(WrOpcode.RDMA_READ, [a.sge(0, 16)], remote_address=0x1005, rkey=moved.rkey))
    assert a.one().status is WcStatus.SUCCESS
    assert a.memory[:16].tolist() == list(range(5, 21))


def test_errors_come_as_completions_and_flush_the_rest(ends: tuple[End, End]) -> None:
    a, b = ends
    bad = SendWr(WrOpcode.RDMA_WRITE, [a.sge()], wr_id=1, remote_address=b.region.iova, rkey=b.region.rkey ^ 0x55)
    a.qp.post_send([bad, replace(bad, wr_id=2, rkey=b.region.rkey)])
    first, second = a.cq.wait(2, timeout=PATIENCE_S)
    assert (first.wr_id, first.status) == (1, WcStatus.REM_ACCESS_ERR)
    assert (second.wr_id, second.status) == (2, WcStatus.WR_FLUSH_ERR)
    assert a.qp.state is QpState.ERR


def test_a_closed_region_is_unreachable(ends: tuple[End, End]) -> None:
    a, b = ends
    b.region.close()
    a.qp.post_send(SendWr(WrOpcode.RDMA_READ, [a.sge()], remote_address=b.region.iova, rkey=b.region.rkey))
    assert a.one().status is WcStatus.REM_ACCESS_ERR


def test_unmapped_local_memory_is_a_local_error(ends: tuple[End, End]) -> None:
    a, b = ends
    everything = a.pd.register(access=Access.LOCAL_WRITE)
    wr = SendWr(WrOpcode.RDMA_WRITE, [Sge(4096, 8, everything.lkey)], remote_address=b.region.iova, rkey=b.region.rkey)
    a.qp.post_send(wr)
    assert a.one().status is WcStatus.LOC_PROT_ERR


def test_events_name_the_queue_pair(ends: tuple[End, End]) -> None:
    a, b = ends
    a.qp.post_send(SendWr(WrOpcode.RDMA_WRITE, [a.sge()], remote_address=8, rkey=1))
    assert a.one().status is WcStatus.REM_ACCESS_ERR
    seen = b.device.events(timeout=PATIENCE_S)
    assert (nopin.AsyncEventType.QP_ACCESS_ERR, b.qp) in [(event.kind, event.target) for event in seen]


def test_a_full_queue_says_so_and_posts_nothing(device: nopin.Device) -> None:
    end = make_end(device, QpCaps(max_send_wr=4, max_recv_wr=2))
    end.qp.post_recv([RecvWr(), RecvWr()])
    with pytest.raises(nopin.QueueFull):
        end.qp.post_recv(RecvWr())
    with pytest.raises(nopin.QueueFull):
        end.qp.post_send([SendWr(WrOpcode.SEND)] * 5)
    assert end.qp.send_ring.free == 4


def test_capacities_bound_each_request(device: nopin.Device) -> None:
    end = make_end(device, QpCaps(max_send_sge=1, max_inline=16))
    with pytest.raises(nopin.UsageError, match="takes 1"):
        end.qp.post_send(SendWr(WrOpcode.SEND, [end.sge(), end.sge()]))
    with pytest.raises(nopin.UsageError, match="max_inline"):
        end.qp.post_send(SendWr(WrOpcode.SEND, inline=bytes(17)))
    with pytest.raises(nopin.UsageError, match="not SEND_WITH_IMM"):
        end.qp.post_send_array(
            1, opcode=WrOpcode.SEND_WITH_IMM, local_address=0, length=0, lkey=0, remote_address=0, rkey=0
        )


def test_the_state_machine_is_the_verbs_one(device: nopin.Device) -> None:
    end = make_end(device)
    assert end.qp.state is QpState.RESET
    with pytest.raises(nopin.ServerRefused, match="RTS") as caught:
        end.qp.modify(nopin.QpAttr(state=QpState.RTS))
    assert caught.value.errno == 22
    end.qp.connect(end.qp.endpoint, path_mtu=512)
    assert (end.qp.state, end.qp.query().path_mtu) == (QpState.RTS, 512)
    end.qp.modify(nopin.QpAttr(state=QpState.RESET))
    assert end.qp.state is QpState.RESET


def test_objects_of_two_devices_make_no_queue_pair(device: nopin.Device, servers: tuple[str, str]) -> None:
    with nopin.Device(servers[0]) as other, pytest.raises(nopin.UsageError, match="another Device"):
        device.alloc_pd().create_qp(other.create_cq(16))


def test_work_posted_early_waits_for_the_queue_pair_to_be_connected(device: nopin.Device) -> None:
    a, b = make_end(device), make_end(device)
    a.qp.post_send(SendWr(WrOpcode.RDMA_WRITE))  # of no bytes
    assert a.cq.wait(timeout=0.05) == []
    a.qp.connect(b.qp.endpoint)
    b.qp.connect(a.qp.endpoint)
    (wc,) = a.cq.wait(timeout=10.0)
    assert wc.status == WcStatus.SUCCESS


def test_waiting_ends_at_its_timeout(device: nopin.Device) -> None:
    cq = device.create_cq(16)
    began = time.monotonic()
    assert cq.wait(timeout=0.02) == []
    assert time.monotonic() - began >= 0.02


def test_waiting_for_several_returns_what_came(ends: tuple[End, End]) -> None:
    a, b = ends
    a.qp.post_send(SendWr(WrOpcode.RDMA_READ, [a.sge()], remote_address=b.region.iova, rkey=b.region.rkey))
    assert len(a.cq.wait(2, timeout=0.2)) == 1


def test_a_channel_wakes_who_sleeps(ends: tuple[End, End]) -> None:
    a, b = ends
    channel = b.device.create_channel()
    cq = b.device.create_cq(16, channel)
    cq.arm()
    assert not channel.wait(timeout=0)
    qp = b.pd.create_qp(cq)
    other = a.pd.create_qp(a.cq)
    qp.connect(other.endpoint)
    other.connect(qp.endpoint)
    qp.post_recv(RecvWr([b.sge()]))
    threading.Timer(0.02, other.post_send, [SendWr(WrOpcode.SEND, [a.sge()])]).start()
    assert select.select([channel], [], [], PATIENCE_S)[0]
    assert channel.wait(timeout=0)
    assert len(cq.poll()) == 1


def test_children_close_before_their_parents(device: nopin.Device) -> None:
    channel = device.create_channel()
    cq = device.create_cq(16, channel)
    pd = device.alloc_pd()
    qp = pd.create_qp(cq)
    region = pd.register(bytearray(10), access="l")
    channel.close()
    assert cq.closed
    assert qp.closed
    pd.close()
    assert region.closed
    uses: list[Callable[[], object]] = [
        cq.poll,
        qp.query,
        lambda: qp.post_send(SendWr(WrOpcode.SEND)),
        lambda: pd.create_qp(cq),
    ]
    for use in uses:
        with pytest.raises(nopin.Closed):
            use()
    channel.close()
    qp.close()


def test_writing_into_constant_memory_is_refused(device: nopin.Device) -> None:
    pd = device.alloc_pd()
    constant = np.arange(10)
    constant.flags.writeable = False
    for access in ("w", "l", "a"):
        with pytest.raises(nopin.UsageError, match="read-only"):
            pd.register(constant, access=access)
    assert pd.register(constant, access="r").length == 80


def test_limits_of_the_server_are_clear_errors(device: nopin.Device) -> None:
    pd, cq = device.alloc_pd(), device.create_cq(16)
    with pytest.raises(nopin.ServerRefused, match="qp_depth") as caught:
        pd.create_qp(cq, caps=QpCaps(max_send_wr=1 << 20))
    assert caught.value.code == "limit"
    with pytest.raises(nopin.UsageError):
        device.create_cq(0)


@pytest.mark.needs_io_uring
def test_a_pinned_region_keeps_its_frames(device: nopin.Device) -> None:
    memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:5] = b"first"
    with device.share(memory, discipline="pinned") as share, nopin.attach(share.url, device=device) as remote:
        assert remote[:5].tobytes() == b"first"
        memory.madvise(mmap.MADV_DONTNEED)
        memory[:5] = b"later"
        assert remote[:5].tobytes() == b"first", "the hazard of pinning: the device keeps the old page"
    with pytest.raises(nopin.UsageError, match="cannot be pinned"):
        device.share(discipline="pinned")
    with pytest.raises(nopin.ServerRefused, match="not mapped") as caught:
        device.share(4096, 4096, discipline="pinned")
    assert caught.value.code == "efault"


@pytest.mark.needs_io_uring
def test_pinning_over_the_limit_names_the_limit() -> None:
    buffer = bytearray(1 << 20)
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)  # root may pin beyond the limit
        try:
            pin(memory_of(buffer).address, 1 << 20)
        except nopin.ServerRefused as error:
            os.write(tell, f"{error.code} {error.errno} {error}".encode())
        finally:
            os._exit(0)
    os.close(tell)
    os.waitpid(pid, 0)
    words = os.read(told, 4096).decode()
    os.close(told)
    assert words.startswith("memlock 12 ")
    assert "RLIMIT_MEMLOCK (64 KiB)" in words


def test_an_argument_of_the_wrong_type_takes_nothing_else_with_it(device: nopin.Device) -> None:
    pd, cq = device.alloc_pd(), device.create_cq(np.int64(8))  # type: ignore[arg-type]  # is as good as an int
    for nonsense in ("8", 8.5, None):
        with pytest.raises(nopin.UsageError, match="max_send_wr"):
            pd.create_qp(cq, caps=QpCaps(max_send_wr=nonsense))  # type: ignore[arg-type]  # the wrong move
    with pytest.raises(nopin.UsageError, match=r"attr\.state"):
        pd.create_qp(cq).modify(nopin.QpAttr(state="RTS"))  # type: ignore[arg-type]  # the wrong move
    with pytest.raises(nopin.UsageError, match="depth 'many'"):
        device.create_cq("many")  # type: ignore[arg-type]  # the wrong move
    assert pd.create_qp(cq).state is QpState.RESET, "the server still knows this client, and all it had"


def test_nothing_of_a_device_can_be_copied_or_pickled(device: nopin.Device) -> None:
    """A copy would close what it is a copy of."""
    memory = np.arange(10)
    with device.share(memory) as share, nopin.attach(share.url, device=device) as remote:
        for each in (device, device.alloc_pd(), device.create_cq(8), share, share.region, remote):
            for make in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match="belongs to this process"):
                    make(each)
        with pytest.raises(TypeError, match="attach to"):
            pickle.dumps(share)
        assert (remote[...] == memory).all()


def test_what_was_closed_does_not_open_again(device: nopin.Device) -> None:
    cq = device.create_cq(8)
    with cq:
        pass
    with pytest.raises(nopin.Closed), cq:
        pytest.fail("entered")


def test_objects_of_two_devices_do_not_go_together(servers: tuple[str, str], device: nopin.Device) -> None:
    with nopin.Device(servers[0]) as other:
        with pytest.raises(nopin.UsageError, match="channel is of another Device"):
            device.create_cq(8, other.create_channel())
        with pytest.raises(nopin.UsageError, match="queue is of another Device"):
            device.alloc_pd().create_qp(other.create_cq(8))


def test_what_the_other_side_may_do_can_be_said_in_letters(device: nopin.Device) -> None:
    end = make_end(device)
    end.qp.connect(end.qp.endpoint, access="r")
    assert end.qp.query().access == Access.REMOTE_READ
    with pytest.raises(nopin.UsageError, match="letters"):
        make_end(device).qp.connect(end.qp.endpoint, access="x")
