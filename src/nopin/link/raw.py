"""The link for peers that are not nopin: a raw socket shows the IP header their ICRC covers."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from nopin.errors import HostLacks, UsageError
from nopin.link.udp import SendHalf, check_address, mtu_of
from nopin.linux.raw import open_raw_udp
from nopin.linux.udp import BatchReceiver, kernel_drops, open_datagram
from nopin.nic.wire.batch import ROCE_PORT, Endpoint, PacketBatch, Path, TxBatch
from nopin.nic.wire.gid import V4_PREFIX, gid_of, is_ipv4
from nopin.nic.wire.icrc import verify
from nopin.nic.wire.opcodes import MIN_PACKET_BYTES
from nopin.nic.wire.records import gather

_HEADERS = np.dtype(
    [
        ("version_ihl", "u1"),
        ("tos", "u1"),
        ("total_bytes", ">u2"),
        ("fragment_word", ">u4"),
        ("ttl", "u1"),
        ("protocol", "u1"),
        ("checksum", ">u2"),
        ("source", "V4"),
        ("destination", "V4"),
        ("source_port", ">u2"),
        ("destination_port", ">u2"),
        ("udp_bytes", ">u2"),
        ("udp_checksum", ">u2"),
    ]
)
_IP_BYTES = 20
_UDP_BYTES = 8
_VERSION_4_NO_OPTIONS = 0x45

_SLOTS = 64
_SLOT_BYTES = 8192
"""Room for any single packet; a merged one is cut, and so noticed."""

_RECEIVE_CALLS = 4
_UNREAD_BYTES = 4096


class RawLink:
    """RoCEv2 over IPv4 with every ICRC checked against the sender's real header; needs CAP_NET_RAW.

    Packets leave one per datagram, because segmentation would number them (identification 0, 1, 2 ...) and a
    strict receiver's ICRC covers that number. Incoming ICRCs may be computed with the real identification, as
    hardware and Soft-RoCE do, or with 0, as nopin's own `UdpLink` does; anything else is dropped and counted.

    A nopin peer on the same host must not send through a `UdpLink`: its segmented messages never get cut on
    their way here, and are dropped as `malformed`.

    IPv6 has no field that a receiver cannot know, so there `UdpLink` already checks everything.

    Raises:
        UsageError: not one definite IPv4 address.
        HostLacks: no permission for raw sockets.
        OSError: the port is taken, or the address is not ours.
    """

    def __init__(self, address: str, port: int = ROCE_PORT) -> None:
        check_address(address)
        if not is_ipv4(gid_of(address)):
            raise UsageError("IPv6 needs no raw link: nothing in its header is unknown; use the ordinary one")
        # Never read. It makes the kernel accept the packets, and gives our packets their source port.
        try:
            self._companion = open_datagram(address, port, receive_bytes=_UNREAD_BYTES)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            text = (
                f"UDP port {port} of {address} is taken, and foreign peers know no other; name another address (--bind)"
            )
            raise OSError(error.errno, text) from error
        port = self._companion.getsockname()[1]
        try:
            self._raw = open_raw_udp(address, port)
        except PermissionError as error:
            self._companion.close()
            raise HostLacks("raw sockets", "permission denied", "run as root or with CAP_NET_RAW") from error
        except OSError:
            self._companion.close()
            raise
        self.endpoint = Endpoint(gid_of(address), port)
        self.mtu = mtu_of(address)
        self._receiver = BatchReceiver(self._raw, _SLOTS, _SLOT_BYTES)
        self._sending = SendHalf(self._companion, 0, uses_segmentation=False)
        self._packets_received = 0
        self._malformed = 0
        self._icrc_errors = 0
        self._receive_errors = 0

    def send(self, batch: TxBatch, now: int) -> None:
        """Send the packets, one datagram each."""
        self._sending.send(batch)

    def receive(self, now: int) -> Iterator[PacketBatch]:
        """Packets whose ICRC is right, one batch per run of one sender, at most about 2 MiB."""
        for _ in range(_RECEIVE_CALLS):
            try:
                n = self._receiver.receive()
            except OSError:
                self._receive_errors += 1
                continue
            if n:
                yield from self._batches(n)
            if n < _SLOTS:
                return

    def _batches(self, n: int) -> Iterator[PacketBatch]:
        slots = np.arange(n, dtype=np.int64) * _SLOT_BYTES
        headers = gather(self._receiver.buffer, slots, _HEADERS)
        well_formed = self._well_formed(headers, self._receiver.lengths[:n])
        self._malformed += n - int(well_formed.sum())
        slots, headers = slots[well_formed], headers[well_formed]
        for start, end in _runs(headers):
            run = headers[start:end]
            source = Endpoint(V4_PREFIX + run["source"][0].tobytes(), int(run["source_port"][0]))
            path = Path(self.endpoint, source)
            yield from self._checked(path, slots[start:end] + _IP_BYTES + _UDP_BYTES, run)

    def _well_formed(self, headers: NDArray[np.void], lengths: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Whole, without options, and long enough to be a packet; (n,) bool."""
        total = headers["total_bytes"].astype(np.int64)
        good: NDArray[np.bool_] = headers["version_ihl"] == _VERSION_4_NO_OPTIONS
        good &= total == lengths
        good &= headers["udp_bytes"] == total - _IP_BYTES
        good &= total >= _IP_BYTES + _UDP_BYTES + MIN_PACKET_BYTES
        return good

    def _checked(self, path: Path, offsets: NDArray[np.int64], headers: NDArray[np.void]) -> Iterator[PacketBatch]:
        buffer = self._receiver.buffer
        lengths = headers["udp_bytes"].astype(np.int64) - _UDP_BYTES
        words = headers["fragment_word"].astype(np.uint32)
        good = verify(buffer, offsets, lengths, path, words)
        if not good.all():
            good |= verify(buffer, offsets, lengths, path)
            self._icrc_errors += len(good) - int(good.sum())
            offsets, lengths = offsets[good], lengths[good]
        self._packets_received += len(offsets)
        if len(offsets):
            yield PacketBatch(path, buffer, offsets, lengths, icrc_checked=True)

    def filenos(self) -> list[int]:
        """The raw socket; its companion is never read."""
        return [self._raw.fileno()]

    def next_deadline(self) -> int | None:
        """Never: nothing is held back."""
        return None

    def close(self) -> None:
        """Close both sockets."""
        self._raw.close()
        self._companion.close()

    def statistics(self) -> dict[str, int]:
        """Packets and errors each way."""
        return {
            **self._sending.statistics(),
            "packets_received": self._packets_received,
            "malformed": self._malformed,
            "icrc_errors": self._icrc_errors,
            "receive_errors": self._receive_errors,
            "kernel_dropped": kernel_drops(self._raw) if self._raw.fileno() >= 0 else 0,
        }


def _runs(headers: NDArray[np.void]) -> Iterator[tuple[int, int]]:
    """Ranges [start, end) of one source address and port."""
    if len(headers) == 0:
        return
    sources = headers["source"].tolist()
    senders = list(zip(sources, headers["source_port"].tolist(), strict=True))
    start = 0
    for index in range(1, len(senders) + 1):
        if index == len(senders) or senders[index] != senders[start]:
            yield start, index
            start = index
