"""Each verbs operation over real servers and both paths, with what its completions say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import pytest
from own_memory import Pages, anonymous
from verbs_pair import CAPS, PATHS, PATIENCE_S, WIRE, End, Pair, Servers, connect, connected, running_servers

from nopin import (
    Access,
    AddressVector,
    AsyncEventType,
    Device,
    QpState,
    QueueFull,
    RecvWr,
    SendFlags,
    SendWr,
    ServerRefused,
    Wc,
    WcFlags,
    WcOpcode,
    WcStatus,
    WrOpcode,
    attach,
)
from nopin.nic.attributes import QpAttr
from nopin.units import U64_MAX


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with running_servers(tmp_path_factory.mktemp("operations")) as running:
        yield running


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(servers: Servers, path: str) -> Iterator[Pair]:
    with connected(servers, path) as pair:
        yield pair


@pytest.fixture
def pages() -> Iterator[Pages]:
    """The owner's memory in the front half, the peer's in the back half."""
    with anonymous(8) as pages:
        yield pages


THEIRS = 4 * 4096


def both(pair: Pair, wr: SendWr) -> tuple[Wc, Wc]:
    """Carry out a request that consumes a receive; the peer's completion and the owner's."""
    return pair.peer.run(wr), pair.owner.next_completion()


def test_a_send_arrives_in_the_receive_and_completes_on_both_sides(pair: Pair, pages: Pages) -> None:
    pages.put(THEIRS, b"a message")
    pair.owner.receive_into(pair.owner.sge(pages.address, 100), wr_id=77)
    sent, received = both(pair, SendWr(WrOpcode.SEND, [pair.peer.sge(pages.address + THEIRS, 9)]))
    assert (sent.status, sent.opcode, sent.qp_num) == (WcStatus.SUCCESS, WcOpcode.SEND, pair.peer.qp.qpn)
    assert (received.wr_id, received.status, received.opcode) == (77, WcStatus.SUCCESS, WcOpcode.RECV)
    assert (received.byte_len, received.wc_flags) == (9, WcFlags.NONE)
    assert (received.qp_num, received.src_qp) == (pair.owner.qp.qpn, pair.peer.qp.qpn)
    assert pages.get(0, 10) == b"a message\0"


def test_immediate_data_arrives_with_a_send_and_with_a_write(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.address, THEIRS)
    pages.put(THEIRS, b"12345")
    sge = pair.peer.sge(pages.address + THEIRS, 5)
    pair.owner.receive_into(pair.owner.sge(pages.address, 5))
    _, received = both(pair, SendWr(WrOpcode.SEND_WITH_IMM, [sge], imm=0xDEADBEEF))
    assert (received.opcode, received.imm, received.wc_flags) == (WcOpcode.RECV, 0xDEADBEEF, WcFlags.WITH_IMM)
    pair.owner.receive_into()
    wr = SendWr(WrOpcode.RDMA_WRITE_WITH_IMM, [sge], imm=7, remote_address=pages.address + 100, rkey=region.rkey)
    sent, received = both(pair, wr)
    assert sent.opcode is WcOpcode.RDMA_WRITE
    assert (received.opcode, received.imm, received.byte_len) == (WcOpcode.RECV_RDMA_WITH_IMM, 7, 5)
    assert pages.get(0, 5) == pages.get(100, 5) == b"12345"


def test_send_with_invalidate_closes_the_key_it_names(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.address, THEIRS)
    pair.owner.receive_into()
    _, received = both(pair, SendWr(WrOpcode.SEND_WITH_INV, imm=region.rkey))
    assert (received.status, received.wc_flags, received.imm) == (WcStatus.SUCCESS, WcFlags.WITH_INV, region.rkey)
    status = pair.peer.write(pages.address, region.rkey, pages.address + THEIRS, 8)
    assert status is WcStatus.REM_ACCESS_ERR


def test_inline_bytes_are_taken_when_posted(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.address, THEIRS)
    data = bytearray(b"at the time of posting")
    wr = SendWr(WrOpcode.RDMA_WRITE, inline=bytes(data), remote_address=pages.address + 1, rkey=region.rkey)
    pair.peer.qp.post_send(wr)
    data[:] = b"changed right after it"
    assert pair.peer.next_completion().status is WcStatus.SUCCESS
    assert pages.get(1, len(data)) == b"at the time of posting"
    pair.owner.receive_into(pair.owner.sge(pages.address + 1000, 64))
    sent, received = both(pair, SendWr(WrOpcode.SEND, inline=bytes(range(64))))
    assert (sent.status, received.byte_len) == (WcStatus.SUCCESS, 64)
    assert pages.get(1000, 64) == bytes(range(64))


def test_atomics_return_what_was_there_and_wrap(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.address, THEIRS)
    word, answer = pages.address + 8, pages.address + THEIRS

    def atomic(opcode: WrOpcode, compare_add: int, swap: int = 0) -> tuple[int, int]:
        assert pair.peer.atomic(opcode, word, region.rkey, answer, compare_add, swap) is WcStatus.SUCCESS
        return int.from_bytes(pages.get(THEIRS, 8), "little"), int.from_bytes(pages.get(8, 8), "little")

    assert atomic(WrOpcode.ATOMIC_FETCH_AND_ADD, 5) == (0, 5)
    assert atomic(WrOpcode.ATOMIC_FETCH_AND_ADD, U64_MAX) == (5, 4)
    assert atomic(WrOpcode.ATOMIC_CMP_AND_SWP, 3, 99) == (4, 4)
    assert atomic(WrOpcode.ATOMIC_CMP_AND_SWP, 4, 99) == (4, 99)


def test_many_peers_adding_at_once_lose_nothing(servers: Servers, pages: Pages) -> None:
    """Over the wire and directly at the same time, many requests of each under way."""
    n_each, word = 100, pages.address
    with connected(servers, "wire") as remote, connected(servers, "direct") as local:
        regions = [pair.owner.register(word, 8) for pair in (remote, local)]
        for pair, region in zip((remote, local), regions, strict=True):
            sge = pair.peer.sge(pages.address + THEIRS, 8)
            wr = SendWr(WrOpcode.ATOMIC_FETCH_AND_ADD, [sge], remote_address=word, rkey=region.rkey, compare_add=1)
            pair.peer.qp.post_send([wr] * n_each)
        for pair in (remote, local):
            completions = pair.peer.cq.wait(n_each, PATIENCE_S)
            assert {wc.status for wc in completions} == {WcStatus.SUCCESS}
    assert int.from_bytes(pages.get(0, 8), "little") == 2 * n_each


def test_a_send_waits_for_a_receive_to_be_posted(pair: Pair, pages: Pages) -> None:
    pages.put(THEIRS, b"patience")
    pair.peer.qp.post_send(SendWr(WrOpcode.SEND, [pair.peer.sge(pages.address + THEIRS, 8)]))
    assert pair.peer.cq.wait(1, 0.05) == []
    pair.owner.receive_into(pair.owner.sge(pages.address, 8))
    assert pair.peer.next_completion().status is pair.owner.next_completion().status is WcStatus.SUCCESS
    assert pages.get(0, 8) == b"patience"


def test_a_receiver_that_never_is_ready_exhausts_its_retries(servers: Servers, path: str, pages: Pages) -> None:
    with Device(servers.owner_path()) as ours, Device(servers.peer_path(path)) as theirs:
        owner, peer = End(ours), End(theirs)
        owner.qp.connect(peer.qp.endpoint, min_rnr_timer=1)
        peer.qp.connect(owner.qp.endpoint, rnr_retry=2)
        assert peer.run(SendWr(WrOpcode.SEND)).status is WcStatus.RNR_RETRY_EXC_ERR
        assert peer.qp.state is QpState.ERR


def test_a_message_longer_than_its_receive_fails_on_both_sides(pair: Pair, pages: Pages) -> None:
    before = pages.fill(1)
    pair.owner.receive_into(pair.owner.sge(pages.address, 99))
    sent, received = both(pair, SendWr(WrOpcode.SEND, [pair.peer.sge(pages.address + THEIRS, 100)]))
    assert (sent.status, received.status) == (WcStatus.REM_INV_REQ_ERR, WcStatus.LOC_LEN_ERR)
    assert pages.get(99, THEIRS - 99) == before[99:THEIRS]


def test_a_receive_of_another_domain_fails_on_both_sides(pair: Pair, pages: Pages) -> None:
    foreign = pair.owner.device.alloc_pd().register(pages.address, 100, access="l")
    pair.owner.receive_into(pair.owner.sge(pages.address, 100)._replace(lkey=foreign.lkey))
    sent, received = both(pair, SendWr(WrOpcode.SEND, [pair.peer.sge(pages.address + THEIRS, 8)]))
    assert (sent.status, received.status) == (WcStatus.REM_OP_ERR, WcStatus.LOC_PROT_ERR)


def test_only_signalled_requests_and_failed_ones_complete(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.address, THEIRS)

    def write(wr_id: int, flags: SendFlags, rkey: int) -> SendWr:
        sge = pair.peer.sge(pages.address + THEIRS, 8)
        return SendWr(WrOpcode.RDMA_WRITE, [sge], wr_id, flags, pages.address, rkey)

    quiet = write(1, SendFlags.NONE, region.rkey)
    pair.peer.qp.post_send([quiet, quiet, write(2, SendFlags.SIGNALED, region.rkey)])
    assert pair.peer.next_completion().wr_id == 2
    pair.peer.qp.post_send([write(3, SendFlags.NONE, region.rkey ^ 1), write(4, SendFlags.NONE, region.rkey)])
    failed, flushed = pair.peer.next_completion(), pair.peer.next_completion()
    assert (failed.wr_id, failed.status) == (3, WcStatus.REM_ACCESS_ERR)
    assert (flushed.wr_id, flushed.status) == (4, WcStatus.WR_FLUSH_ERR)


def test_a_fenced_write_sends_what_the_read_before_it_brought(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.address, THEIRS)
    for number in range(50):
        pages.put(0, b"round %3d" % number)
        sge = pair.peer.sge(pages.address + THEIRS, 9)
        read = SendWr(WrOpcode.RDMA_READ, [sge], remote_address=pages.address, rkey=region.rkey)
        write = SendWr(
            WrOpcode.RDMA_WRITE,
            [sge],
            flags=SendFlags.SIGNALED | SendFlags.FENCE,
            remote_address=pages.address + 2000,
            rkey=region.rkey,
        )
        pair.peer.qp.post_send([read, write])
        assert {pair.peer.next_completion().status for _ in range(2)} == {WcStatus.SUCCESS}
        assert pages.get(2000, 9) == b"round %3d" % number


def test_a_full_queue_refuses_and_has_room_again_after_completions(pair: Pair, pages: Pages) -> None:
    depth = pair.peer.qp.caps.max_recv_wr
    receive = RecvWr([pair.owner.sge(pages.address, 8)])
    pair.owner.qp.post_recv([receive] * depth)
    with pytest.raises(QueueFull):
        pair.owner.qp.post_recv(receive)
    assert both(pair, SendWr(WrOpcode.SEND, inline=b"12345678"))[1].status is WcStatus.SUCCESS
    pair.owner.qp.post_recv(receive)


def test_a_queue_pair_that_was_idle_beside_a_busy_one_is_heard_again(
    servers: Servers, path: str, pair: Pair, pages: Pages
) -> None:
    region = pair.owner.register(pages.address, THEIRS, Access.REMOTE_WRITE | Access.LOCAL_WRITE)
    write = SendWr(WrOpcode.RDMA_WRITE, inline=b"12345678", remote_address=pages.address, rkey=region.rkey)
    assert pair.peer.run(write).status is WcStatus.SUCCESS
    idle = pair.peer.qp.send_ring
    with connected(servers, path) as busy:
        there = busy.owner.register(pages.address, THEIRS, Access.REMOTE_WRITE | Access.LOCAL_WRITE)
        until = time.monotonic() + PATIENCE_S
        while not idle.unattended and time.monotonic() < until:
            keeps = SendWr(WrOpcode.RDMA_WRITE, inline=b"12345678", remote_address=pages.address, rkey=there.rkey)
            assert busy.peer.run(keeps).status is WcStatus.SUCCESS
        assert idle.unattended
        assert pair.peer.run(write).status is WcStatus.SUCCESS
        assert not idle.unattended


def test_a_channel_fires_for_an_armed_queue_only(servers: Servers, path: str) -> None:
    with connected(servers, path) as pair:
        channel = pair.owner.device.create_channel()
        cq = pair.owner.device.create_cq(16, channel)
        extra = End(pair.peer.device)
        armed = pair.owner.pd.create_qp(cq, caps=CAPS)
        connect(armed, extra.qp)
        armed.post_recv([RecvWr(), RecvWr()])
        assert extra.run(SendWr(WrOpcode.SEND)).status is WcStatus.SUCCESS
        assert not channel.wait(0.05)
        cq.arm()
        assert extra.run(SendWr(WrOpcode.SEND)).status is WcStatus.SUCCESS
        assert channel.wait(PATIENCE_S)
        assert len(cq.wait(2, PATIENCE_S)) == 2


def test_solicited_notice_waits_for_a_solicited_message(pair: Pair) -> None:
    cq, channel = pair.owner.cq, pair.owner.cq.channel
    pair.owner.qp.post_recv([RecvWr(), RecvWr()])
    cq.arm(solicited_only=True)
    assert pair.peer.run(SendWr(WrOpcode.SEND)).status is WcStatus.SUCCESS
    assert not channel.wait(0.05)
    flags = SendFlags.SIGNALED | SendFlags.SOLICITED
    assert pair.peer.run(SendWr(WrOpcode.SEND, flags=flags)).status is WcStatus.SUCCESS
    assert channel.wait(PATIENCE_S)


def test_a_queue_pair_in_error_flushes_what_is_posted_and_starts_afresh_from_reset(pair: Pair, pages: Pages) -> None:
    region = pair.owner.register(pages.address, THEIRS)
    pair.owner.receive_into(wr_id=5)
    for end in (pair.owner, pair.peer):
        end.qp.modify(QpAttr(state=QpState.ERR))
    flushed = pair.owner.next_completion()
    assert (flushed.wr_id, flushed.status) == (5, WcStatus.WR_FLUSH_ERR)
    assert pair.peer.run(SendWr(WrOpcode.SEND)).status is WcStatus.WR_FLUSH_ERR
    for end in (pair.owner, pair.peer):
        end.qp.modify(QpAttr(state=QpState.RESET))
    connect(pair.owner.qp, pair.peer.qp)
    pages.put(THEIRS, b"afresh")
    assert pair.peer.write(pages.address, region.rkey, pages.address + THEIRS, 6) is WcStatus.SUCCESS
    assert pages.get(0, 6) == b"afresh"


def test_illegal_steps_are_refused_and_change_nothing(servers: Servers) -> None:
    with Device(servers.owner_path()) as device:
        end = End(device)
        for attr in (QpAttr(state=QpState.RTS), QpAttr(state=QpState.INIT), QpAttr(path_mtu=1000)):
            with pytest.raises(ServerRefused) as refused:
                end.qp.modify(attr)
            assert refused.value.errno == 22
            assert end.qp.state is QpState.RESET


def test_a_connection_that_comes_alive_is_told_once(servers: Servers, path: str) -> None:
    """The passive side learns by the first message, in RTR, that the connection stands."""
    with Device(servers.owner_path()) as ours, Device(servers.peer_path(path)) as theirs:
        owner, peer = End(ours), End(theirs)
        peer.qp.connect(owner.qp.endpoint)
        owner.qp.modify(QpAttr(state=QpState.INIT, pkey_index=0, port_num=1, access=int(Access.REMOTE_WRITE)))
        owner.receive_into()
        owner.qp.modify(
            QpAttr(
                state=QpState.RTR,
                av=address_of(peer),
                path_mtu=ours.info.mtu,
                dest_qpn=peer.qp.qpn,
                rq_psn=peer.qp.endpoint.psn,
                max_dest_rd_atomic=1,
                min_rnr_timer=12,
            )
        )
        assert peer.run(SendWr(WrOpcode.SEND)).status is WcStatus.SUCCESS
        (event,) = owner.events_of(AsyncEventType.COMM_EST)
        assert event.target is owner.qp


def address_of(end: End) -> AddressVector:
    return AddressVector(gid=end.qp.endpoint.gid, port=end.qp.endpoint.port)


def test_a_remote_array_counts_and_swaps(servers: Servers, path: str) -> None:
    array = np.array([10, -1, 2**62], np.int64)
    with (
        Device(servers.owner_path()) as ours,
        Device(servers.peer_path(path)) as theirs,
        ours.share(array, access="rwa") as share,
        attach(share.url, device=theirs) as remote,
    ):
        assert remote.fetch_add(0, -11) == 10
        assert remote.fetch_add(2, 2**62) == 2**62
        assert remote.compare_swap(1, 5, 6) == -1
        assert remote.compare_swap(1, -1, 6) == -1
        assert array.tolist() == [-1, 6, -(2**63)]


def test_a_remote_array_is_awaited_from_an_event_loop(servers: Servers, path: str) -> None:
    array = np.arange(1000)

    async def work(url: str, device: Device) -> list[int]:
        with attach(url, device=device) as remote:
            await remote.write_async(slice(0, 3), [7, 8, 9])
            pieces = await asyncio.gather(*(remote.read_async(slice(n, n + 2)) for n in range(0, 1000, 100)))
            return [int(piece.sum()) for piece in pieces]

    with Device(servers.owner_path()) as ours, Device(servers.peer_path(path)) as theirs, ours.share(array) as share:
        sums = asyncio.run(work(share.url, theirs))
    assert sums == [15, *(2 * n + 1 for n in range(100, 1000, 100))]


def test_queue_pairs_of_one_server_take_the_direct_path_and_no_others(servers: Servers, path: str) -> None:
    with connected(servers, path) as pair:
        rows = {row["lqpn"]: row for row in pair.peer.device.stat() if row["kind"] == "qp"}
        assert rows[pair.peer.qp.qpn]["direct"] is (path != WIRE)
