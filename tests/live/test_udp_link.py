"""The UDP link over the real loopback: segmentation both ways, both IP versions, refusals."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from nopin.errors import UsageError
from nopin.link.udp import SEND_WAIT_MS, UdpLink, bind_link
from nopin.linux import netif, udp
from nopin.linux.udp import BatchSender
from nopin.mm.space import Staging
from nopin.nic.wire import icrc
from nopin.nic.wire.batch import Endpoint, PacketBatch, Path, Segment, TxBatch
from nopin.nic.wire.bth import emit_bth, parse_bth
from nopin.nic.wire.gid import gid_of
from nopin.nic.wire.opcodes import Opcode

MAX_SEGMENT_BYTES = 65507


def has_ipv6_loopback() -> bool:
    return netif.interface_of("::1") is not None


ADDRESSES = [
    "127.0.0.1",
    pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6_loopback(), reason="no IPv6 loopback")),
]

OpenLink = Callable[..., UdpLink]


@pytest.fixture
def open_link() -> Iterator[OpenLink]:
    links: list[UdpLink] = []

    def opened(address: str = "127.0.0.1") -> UdpLink:
        links.append(UdpLink(address, 0))
        return links[-1]

    yield opened
    for link in links:
        link.close()


def make_batch(path: Path, sizes: list[int], per_segment: int = 15) -> TxBatch:
    """Sealed packets with PSN 0, 1, 2 ... and random payload; runs of equal size share segments."""
    lengths = np.array(sizes, np.int64)
    offsets = np.cumsum(lengths) - lengths
    n_bytes = int(lengths.sum())
    staging = Staging(np.random.default_rng(3).integers(0, 256, n_bytes, np.uint8))
    psn = np.arange(len(sizes), dtype=np.uint32)
    emit_bth(staging.array, offsets, opcode=Opcode.SEND_ONLY, qpn=5, psn=psn)
    icrc.seal(staging.array, offsets, lengths, path)
    segments: list[Segment] = []
    for at, size in zip(offsets.tolist(), sizes, strict=True):
        last = segments[-1] if segments else None
        if last and last.stride == size and last.length + size <= min(per_segment * size, MAX_SEGMENT_BYTES):
            segments[-1] = last._replace(length=last.length + size)
        else:
            segments.append(Segment(at, size, size))
    return TxBatch(path, staging, segments)


def collect(link: UdpLink, n: int) -> tuple[list[int], list[bytes], list[int]]:
    """Wait for n packets: PSNs, their bytes, packets per receive batch."""
    psns: list[int] = []
    packets: list[bytes] = []
    batches: list[int] = []
    while len(psns) < n and select.select(link.filenos(), [], [], 2.0)[0]:
        for batch in link.receive(0):
            assert icrc.verify(batch.buffer, batch.offsets, batch.lengths, batch.path).all()
            psns += parse_bth(batch.buffer, batch.offsets).psn.tolist()
            spans = zip(batch.offsets.tolist(), batch.lengths.tolist(), strict=True)
            packets += [batch.buffer[at : at + length].tobytes() for at, length in spans]
            batches.append(len(batch.offsets))
    return psns, packets, batches


def sent_bytes(batch: TxBatch) -> bytes:
    return batch.staging.array.tobytes()


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "sizes",
    [
        [16],
        [20] * 40,
        [4112] * 45,
        [4128, *[4112] * 20, 1000],
        [1040] * 130,
        [273] * 9,
        [16, 4128, 20, 20, 516],
    ],
    ids=["smallest", "acks", "middles", "write", "mtu 1024", "odd", "mixed"],
)
def test_packets_arrive_whole_in_order_with_good_icrc(open_link: OpenLink, address: str, sizes: list[int]) -> None:
    near, far = open_link(address), open_link(address)
    batch = make_batch(Path(near.endpoint, far.endpoint), sizes)
    near.send(batch, 0)
    psns, packets, _ = collect(far, len(sizes))
    assert psns == list(range(len(sizes)))
    assert b"".join(packets) == sent_bytes(batch)
    assert near.statistics()["packets_sent"] == far.statistics()["packets_received"] == len(sizes)
    assert near.statistics()["bytes_sent"] == far.statistics()["bytes_received"] == sum(sizes)


def test_a_shape_that_comes_again_sends_what_lies_there_now(open_link: OpenLink) -> None:
    near, far = open_link(), open_link()
    path = Path(near.endpoint, far.endpoint)
    batches = [make_batch(path, sizes) for sizes in ([4112] * 30, [1040] * 50 + [20], [4112] * 30)]
    for batch in batches:
        batch.segments = tuple(batch.segments)
    batches[2].segments = batches[0].segments
    for batch in (batches[0], batches[0], batches[1], batches[0], batches[2]):
        near.send(batch, 0)
        n_packets = sum(-(-segment.length // segment.stride) for segment in batch.segments)
        assert b"".join(collect(far, n_packets)[1]) == sent_bytes(batch)
    assert near.statistics()["packets_sent"] == 4 * 30 + 51
    assert near.statistics()["bytes_sent"] == far.statistics()["bytes_received"]


def test_many_that_wait_are_taken_together_after_some_that_came_alone(open_link: OpenLink) -> None:
    near, far = open_link(), open_link()
    path = Path(near.endpoint, far.endpoint)
    for _ in range(3):
        near.send(make_batch(path, [20]), 0)
        assert collect(far, 1)[2] == [1]
    near.send(make_batch(path, [20] * 40, per_segment=1), 0)
    psns, _, batches = collect(far, 40)
    assert psns == list(range(40))
    assert batches[0] == 1
    assert max(batches) > 20, "each was received by a call of its own"


def test_last_packet_of_a_segment_may_be_shorter(open_link: OpenLink) -> None:
    near, far = open_link(), open_link()
    path = Path(near.endpoint, far.endpoint)
    batch = make_batch(path, [1040, 1040, 1040, 500])
    near.send(TxBatch(path, batch.staging, [Segment(0, 3620, 1040)]), 0)
    psns, packets, _ = collect(far, 4)
    assert psns == [0, 1, 2, 3]
    assert [len(packet) for packet in packets] == [1040, 1040, 1040, 500]


def test_segmented_packets_arrive_merged(open_link: OpenLink) -> None:
    near, far = open_link(), open_link()
    near.send(make_batch(Path(near.endpoint, far.endpoint), [4112] * 30), 0)
    _, _, batches = collect(far, 30)
    assert max(batches) >= 15, "one receive call brought single packets only: merging is off"


def test_each_batch_has_one_sender(open_link: OpenLink) -> None:
    far = open_link()
    senders = [open_link() for _ in range(3)]
    for _ in range(2):
        for sender in senders:
            sender.send(make_batch(Path(sender.endpoint, far.endpoint), [64, 64, 64]), 0)
    remotes: list[Endpoint] = []
    n = 0
    while n < 18 and select.select(far.filenos(), [], [], 2.0)[0]:
        for batch in far.receive(0):
            assert batch.path.local == far.endpoint
            assert icrc.verify(batch.buffer, batch.offsets, batch.lengths, batch.path).all()
            remotes.append(batch.path.remote)
            n += len(batch.offsets)
    assert n == 18
    assert set(remotes) == {sender.endpoint for sender in senders}


def test_a_spoiled_packet_fails_its_icrc_and_only_it(open_link: OpenLink) -> None:
    near, far = open_link(), open_link()
    batch = make_batch(Path(near.endpoint, far.endpoint), [400] * 5)
    batch.staging.array[2 * 400 + 77] ^= 4
    near.send(batch, 0)
    good: list[bool] = []
    while len(good) < 5 and select.select(far.filenos(), [], [], 2.0)[0]:
        for got in far.receive(0):
            good += icrc.verify(got.buffer, got.offsets, got.lengths, got.path).tolist()
    assert good == [True, True, False, True, True]


def test_empty_and_tiny_datagrams_do_no_harm(open_link: OpenLink) -> None:
    far = open_link()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for payload in (b"", b"x", b"y" * 15):
            stranger.sendto(payload, ("127.0.0.1", far.endpoint.port))
    got: list[PacketBatch] = []
    lengths: list[int] = []
    while sum(lengths) < 16 and select.select(far.filenos(), [], [], 2.0)[0]:
        for batch in far.receive(0):
            assert not icrc.verify(batch.buffer, batch.offsets, batch.lengths, batch.path).any()
            got.append(batch)
            lengths += batch.lengths.tolist()
    assert lengths == [1, 15]


def test_receiving_when_nothing_came_yields_nothing(open_link: OpenLink) -> None:
    assert list(open_link().receive(0)) == []


def test_nobody_listening_is_counted_or_ignored_but_never_raised(open_link: OpenLink) -> None:
    near, gone = open_link(), open_link()
    nobody = gone.endpoint
    gone.close()
    for _ in range(3):
        near.send(make_batch(Path(near.endpoint, nobody), [100] * 3), 0)
        assert list(near.receive(0)) == []


def test_no_route_is_counted(open_link: OpenLink) -> None:
    near = open_link()
    beyond = Endpoint(gid_of("198.51.100.1"), 4791)  # not reachable from a loopback source address
    near.send(make_batch(Path(near.endpoint, beyond), [100] * 3, per_segment=1), 0)
    assert near.statistics()["send_errors"] == 3
    assert near.statistics()["packets_sent"] == 0


def test_refused_segmentation_falls_back_to_single_packets(
    open_link: OpenLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = open_link(), open_link()
    real = BatchSender.send

    def refuse_segments(self: BatchSender, start: int, end: int) -> int:
        if self.uses_segmentation and self._headers["controllen"][start]:
            raise OSError(errno.EIO, "no checksum offload")
        return real(self, start, end)

    monkeypatch.setattr(BatchSender, "send", refuse_segments)
    batch = make_batch(Path(near.endpoint, far.endpoint), [300, *[256] * 20])
    near.send(TxBatch(batch.path, batch.staging, batch.segments), 0)
    psns, _, _ = collect(far, 21)
    assert psns == list(range(21))
    assert near.statistics()["send_errors"] == 0


def test_a_full_socket_drops_after_a_short_wait(open_link: OpenLink, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = open_link(), open_link()
    waits: list[int] = []

    def full(self: BatchSender, start: int, end: int) -> int:
        raise BlockingIOError(errno.EAGAIN, "full")

    def never(self: BatchSender, timeout_ms: int) -> bool:
        waits.append(timeout_ms)
        return False

    monkeypatch.setattr(BatchSender, "send", full)
    monkeypatch.setattr(BatchSender, "wait_writable", never)
    near.send(make_batch(Path(near.endpoint, far.endpoint), [100] * 20), 0)
    assert near.statistics()["send_dropped"] == 20
    assert waits == [SEND_WAIT_MS]


def test_overflow_is_reported_as_kernel_drops(open_link: OpenLink) -> None:
    near, far = open_link(), open_link()
    far._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(4):
        near.send(make_batch(Path(near.endpoint, far.endpoint), [4112] * 30), 0)
    assert far.statistics()["kernel_dropped"] > 0


def test_loopback_takes_the_largest_mtu(open_link: OpenLink) -> None:
    assert open_link().mtu == 4096


def test_second_link_without_an_address_takes_the_next_loopback_address() -> None:
    first = bind_link()
    second = bind_link()
    try:
        assert first.endpoint.port == second.endpoint.port == 4791
        assert first.endpoint.gid != second.endpoint.gid
    finally:
        first.close()
        second.close()


def test_second_link_on_one_address_takes_another_port() -> None:
    first = bind_link("127.0.0.77")
    second = bind_link("127.0.0.77")
    try:
        assert first.endpoint.gid == second.endpoint.gid
        assert first.endpoint.port == 4791
        assert second.endpoint.port not in (0, 4791)
        with pytest.raises(OSError, match="in use"):
            bind_link("127.0.0.77", 4791)
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("0.0.0.0", "name one"),
        ("::", "name one"),
        ("localhost", "not an IP address"),
        ("203.0.113.1", "not an address of this host"),
    ],
)
def test_an_address_that_cannot_be_used_is_explained(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bind_link(address)


def test_interfaces_are_found_by_address() -> None:
    assert netif.interface_of("127.0.0.1") == netif.interface_of("127.9.9.9") == "lo"
    assert netif.interface_of("203.0.113.1") is None
    assert netif.interface_mtu("lo") >= 1500
    with pytest.raises(OSError, match="No such device"):
        netif.interface_mtu("no-such-if")


@pytest.mark.parametrize("packed", [bytes([192, 0, 2, 1]), bytes(range(16))], ids=["IPv4", "IPv6"])
def test_socket_addresses_are_read_as_written(packed: bytes) -> None:
    sockaddr = udp.pack_address(packed, 4791, 3)
    assert len(sockaddr) == udp.ADDRESS_BYTES
    assert udp.unpack_address(sockaddr) == (packed, 4791)
