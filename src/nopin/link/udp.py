"""The ordinary link: one unconnected UDP socket with segmentation offload both ways.

A lone datagram, which is what latency is made of, is sent and received by the plain calls: they cost a third of those
for many. While datagrams come one by one they are received so, with a look for company now and then.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.errors import UsageError
from nopin.link.base import packets_of, path_mtu_for, split_slots
from nopin.linux import netif
from nopin.linux.udp import (
    ADDRESS_BYTES,
    MAX_DATAGRAM_BYTES,
    BatchReceiver,
    BatchSender,
    enable_gro,
    kernel_drops,
    open_datagram,
    pack_address,
    unpack_address,
)
from nopin.nic.wire.batch import ROCE_PORT, Endpoint, PacketBatch, Path, Runs, Segment, Slices, TxBatch
from nopin.nic.wire.gid import V4_PREFIX, address_of, gid_of, is_ipv4
from nopin.nic.wire.icrc import runs_of, slices_of

RECEIVE_SLOTS = 80
"""Four MiB of 1 MiB messages per system call (their ends come in datagrams of their own), two batches of the sender's:
a batch costs some 0.5 ms of code gone cold, whatever its size. One call at a time, so that requests go out between the
batches of a long stream."""

LONE_IN_A_ROW_MAX = 8
"""Datagrams received by themselves before the next call takes all there are: many small ones may wait by now."""

SEND_WAIT_MS = 4
_DEFAULT_INTERFACE_MTU = 1500
_LOOPBACK_TRIES = 64
_REFUSED_SEGMENTATION = {errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT}
_OUR_BUGS = {errno.EBADF, errno.EFAULT, errno.ENOTSOCK}

Split = tuple[NDArray[np.int64], NDArray[np.int64], Runs]
"""Offsets and lengths of packets, and their runs."""


@lru_cache(maxsize=512)
def endpoint_of(sockaddr: bytes) -> Endpoint:
    """The endpoint a sockaddr names. Remembered, bounded because strangers choose addresses."""
    packed, port = unpack_address(sockaddr)
    return Endpoint(V4_PREFIX + packed if len(packed) == 4 else packed, port)


_SLOT_SHAPES_MAX = 4 * RECEIVE_SLOTS
"""Slots of some shape whose packets are kept cut: 3 kB each, of long messages."""


@lru_cache(maxsize=512)
def sockaddr_of(endpoint: Endpoint, scope: int) -> bytes:
    """The sockaddr of an endpoint; scope is the interface index of link-local IPv6."""
    packed = endpoint.gid[12:] if is_ipv4(endpoint.gid) else endpoint.gid
    return pack_address(packed, endpoint.port, scope)


@lru_cache(maxsize=512)
def _place_of(endpoint: Endpoint, scope: int) -> tuple[str, int] | tuple[str, int, int, int]:
    """The same as Python's own calls take it."""
    address = address_of(endpoint.gid)
    return (address, endpoint.port) if is_ipv4(endpoint.gid) else (address, endpoint.port, 0, scope)


@lru_cache(maxsize=512)
def _path_from(local: Endpoint, source: tuple[Any, ...]) -> Path:
    """The path of a datagram from an address as Python's own calls give it."""
    return Path(local, Endpoint(gid_of(source[0]), source[1]))


@lru_cache(maxsize=256)
def _split_one(length: int, segment_bytes: int) -> Split:
    """`_split` for slot 0 alone."""
    return _split(np.uint32(length).tobytes(), np.uint32(segment_bytes).tobytes())


@lru_cache(maxsize=256)
def _split(lengths: bytes, segment_bytes: bytes) -> Split:
    """`split_slots`, remembered: in steady state every receive has one shape. The arrays are read-only."""
    slots = np.frombuffer(lengths, np.uint32), np.frombuffer(segment_bytes, np.uint32)
    offsets, sizes = split_slots(*slots, MAX_DATAGRAM_BYTES)
    for array in (offsets, sizes):
        array.flags.writeable = False
    return offsets, sizes, runs_of(sizes) if len(offsets) else []


class SendHalf:
    """Sending through a datagram socket: batching, falling back where segmentation is refused, counting."""

    def __init__(self, bound: socket.socket, scope: int, *, uses_segmentation: bool = True) -> None:
        self._sender = BatchSender(bound.fileno(), uses_segmentation=uses_segmentation)
        self._send_to = bound.sendto
        self._scope = scope
        self.packets_sent = 0
        self.bytes_sent = 0
        self.send_errors = 0
        self.send_dropped = 0

    def send(self, batch: TxBatch) -> None:
        """Send a batch; what the socket does not take within a few milliseconds is dropped and counted."""
        if len(batch.segments) == 1 and self._sent_lone(batch):
            return
        self._sender.aim(sockaddr_of(batch.path.remote, self._scope))
        segments = batch.segments if self._sender.uses_segmentation else _singly(batch.segments)
        if len(segments) <= BatchSender.MAX_MESSAGES:
            self._send_messages(batch.staging.address, segments)
            return
        for start in range(0, len(segments), BatchSender.MAX_MESSAGES):
            self._send_messages(batch.staging.address, segments[start : start + BatchSender.MAX_MESSAGES])

    def _sent_lone(self, batch: TxBatch) -> bool:
        """Send a single packet by the plain call; False where there are more, or trouble: the general way knows."""
        ((offset, length, stride),) = batch.segments
        if length > stride:
            return False
        try:
            self._send_to(batch.staging.view[offset : offset + length], _place_of(batch.path.remote, self._scope))
        except OSError:
            return False
        self.packets_sent += 1
        self.bytes_sent += length
        return True

    def _send_messages(self, base: int, segments: Sequence[Segment]) -> None:
        self._sender.load(base, segments)
        at, waited = 0, False
        while at < len(segments):
            try:
                n_sent = self._sender.send(at, len(segments))
            except BlockingIOError:
                if waited or not self._sender.wait_writable(SEND_WAIT_MS):
                    self.send_dropped += sum(map(_n_packets, segments[at:]))
                    return
                waited = True
            except OSError as error:
                if self._can_send_singly(segments[at], error):
                    self._send_singly(base, segments[at:])
                    return
                at += 1
            else:
                n_packets, n_bytes = self._sender.sent(at, at + n_sent)
                self.packets_sent += n_packets
                self.bytes_sent += n_bytes
                at, waited = at + n_sent, False

    def _can_send_singly(self, segment: Segment, error: OSError) -> bool:
        """Look at why a message was refused; True when its packets may pass one by one."""
        if error.errno in _OUR_BUGS:
            raise error
        if segment.stride < segment.length and error.errno in _REFUSED_SEGMENTATION:
            return True
        self.send_errors += 1
        return False

    def _send_singly(self, base: int, segments: Sequence[Segment]) -> None:
        before = self.packets_sent
        single = _singly(segments)
        for start in range(0, len(single), BatchSender.MAX_MESSAGES):
            self._send_messages(base, single[start : start + BatchSender.MAX_MESSAGES])
        if self.packets_sent > before:  # so it was the segmentation that was refused, not the packets
            self._sender.uses_segmentation = False

    def statistics(self) -> dict[str, int]:
        """Packets and bytes sent, messages refused, packets dropped for want of buffer."""
        return {
            "packets_sent": self.packets_sent,
            "bytes_sent": self.bytes_sent,
            "send_errors": self.send_errors,
            "send_dropped": self.send_dropped,
        }


def _n_packets(segment: Segment) -> int:
    return -(-segment.length // segment.stride)


def _singly(segments: Sequence[Segment]) -> list[Segment]:
    return [Segment(offset, length, length) for offset, length in packets_of(segments)]


class UdpLink:
    """RoCEv2 packets over one UDP socket bound to one address.

    The sender's IPv4 identification cannot be seen here, so nopin's ends agree on 0 and the NIC checks ICRCs
    with that; packets of other implementations need `RawLink`.

    Raises:
        UsageError: the address is not an address, is the wildcard (the ICRC needs the real one), or not ours.
        OSError: the port is taken.
    """

    def __init__(self, address: str, port: int = ROCE_PORT) -> None:
        check_address(address)
        try:
            self._socket = open_datagram(address, port)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UsageError(f"{address} is not an address of this host; see `ip address`") from error
            raise
        self.endpoint = Endpoint(gid_of(address), self._socket.getsockname()[1])
        self.mtu = mtu_of(address)
        enable_gro(self._socket)
        self._receiver = BatchReceiver(self._socket, RECEIVE_SLOTS)
        self._n_lone = 0
        self._slices_of_slot = lru_cache(maxsize=_SLOT_SHAPES_MAX)(self._cut_slot)
        self._sending = SendHalf(self._socket, netif.scope_id(address))
        self._packets_received = 0
        self._bytes_received = 0
        self._receive_errors = 0

    def send(self, batch: TxBatch, now: int) -> None:
        """Send the packets; see `SendHalf.send`."""
        self._sending.send(batch)

    def receive(self, now: int) -> Iterable[PacketBatch]:
        """What has arrived, one batch per run of datagrams of one sender, at most about 4 MiB."""
        try:
            if 0 < self._n_lone < LONE_IN_A_ROW_MAX:
                datagram = self._receiver.receive_one()
                return () if datagram is None else (self._batch_of(*datagram),)
            n = self._receiver.receive()
        except OSError as error:
            if error.errno in _OUR_BUGS:
                raise
            self._receive_errors += 1
            return ()
        self._n_lone = int(n == 1)
        return self._batches(n) if n else ()

    def _batch_of(self, length: int, segment_bytes: int, source: tuple[Any, ...]) -> PacketBatch:
        """The packets of a datagram that was received by itself."""
        offsets, lengths, runs = _split_one(length, segment_bytes)
        n = len(offsets)
        self._n_lone = self._n_lone + 1 if n == 1 else 0
        self._packets_received += n
        self._bytes_received += length
        return PacketBatch(_path_from(self.endpoint, source), self._receiver.buffer, offsets, lengths, runs=runs)

    def _batches(self, n: int) -> Iterator[PacketBatch]:
        sources = self._receiver.sources(n)
        lengths, sizes = self._receiver.lengths[:n], self._receiver.segment_bytes[:n]
        self._bytes_received += int(lengths.sum())
        for start, end in _runs(sources, n):
            offsets, packet_lengths, runs = _split(lengths[start:end].tobytes(), sizes[start:end].tobytes())
            if start:
                offsets = offsets + start * MAX_DATAGRAM_BYTES
            slices: Slices = []
            for slot in zip(range(start, end), lengths[start:end].tolist(), sizes[start:end].tolist(), strict=True):
                slices += self._slices_of_slot(*slot)
            source = sources[start * ADDRESS_BYTES : (start + 1) * ADDRESS_BYTES]
            self._packets_received += len(offsets)
            path = Path(self.endpoint, endpoint_of(source))
            yield PacketBatch(path, self._receiver.buffer, offsets, packet_lengths, runs=runs, slices=slices)

    def _cut_slot(self, slot: int, length: int, segment_bytes: int) -> Slices:
        """The packets in a slot of the receiver's buffer. Remembered: shapes of batches vary, those of slots hardly."""
        offsets, sizes, _ = _split_one(length, segment_bytes)
        return slices_of(self._receiver.buffer.data, offsets + slot * MAX_DATAGRAM_BYTES, sizes)

    def filenos(self) -> list[int]:
        """The socket."""
        return [self._socket.fileno()]

    def next_deadline(self) -> int | None:
        """Never: nothing is held back."""
        return None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def statistics(self) -> dict[str, int]:
        """Packets, bytes and errors each way; `kernel_dropped` counts datagrams we were too slow for."""
        return {
            **self._sending.statistics(),
            "packets_received": self._packets_received,
            "bytes_received": self._bytes_received,
            "receive_errors": self._receive_errors,
            "kernel_dropped": kernel_drops(self._socket) if self._socket.fileno() >= 0 else 0,
        }


def _runs(sources: bytes, n: int) -> Iterator[tuple[int, int]]:
    """Slot ranges [start, end) that have one source."""
    first = sources[:ADDRESS_BYTES]
    if first * n == sources:
        yield 0, n
        return
    rows = [sources[at : at + ADDRESS_BYTES] for at in range(0, len(sources), ADDRESS_BYTES)]
    start = 0
    for index in range(1, n + 1):
        if index == n or rows[index] != rows[start]:
            yield start, index
            start = index


def check_address(address: str) -> None:
    """Raise UsageError unless this is one definite address."""
    try:
        gid = gid_of(address)
    except ValueError as error:
        raise UsageError(f"{address!r} is not an IP address; write for example 127.0.0.1") from error
    if gid in (gid_of("0.0.0.0"), gid_of("::")):
        raise UsageError(f"cannot listen on {address}: the packet check covers the address, so name one")


def mtu_of(address: str) -> int:
    """The path MTU for the interface that has the address."""
    name = netif.interface_of(address)
    return path_mtu_for(netif.interface_mtu(name) if name else _DEFAULT_INTERFACE_MTU)


def bind_link(address: str | None = None, port: int | None = None) -> UdpLink:
    """A UDP link on the RoCE port, or close to it when that is taken.

    Without an address: 127.0.0.1, then 127.0.0.2 and so on, all with port 4791. With an address: 4791, then
    any free port. With both: just that.

    Raises:
        UsageError: the address is not one of this host.
        OSError: everything tried is taken.
    """
    if port is not None:
        return UdpLink(address or "127.0.0.1", port)
    if address is None:
        return _bind_loopback()
    try:
        return UdpLink(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return UdpLink(address, 0)


def _bind_loopback() -> UdpLink:
    for last in range(1, _LOOPBACK_TRIES):
        try:
            return UdpLink(f"127.0.0.{last}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise OSError(errno.EADDRINUSE, f"port {ROCE_PORT} is taken on 127.0.0.1 to 127.0.0.{_LOOPBACK_TRIES - 1}")
