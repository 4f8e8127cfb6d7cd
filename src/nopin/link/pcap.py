"""Captures in pcapng, for Wireshark and tcpdump, with the IP and UDP headers put back.

Source: draft-ietf-opsawg-pcapng; link type 101 (raw IP).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path as FilePath

from nopin.link.base import Link, packets_of
from nopin.link.wrapper import Wrapper
from nopin.nic.wire.batch import Endpoint, PacketBatch, TxBatch
from nopin.nic.wire.gid import is_ipv4

LINKTYPE_RAW = 101
_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_BYTE_ORDER_MAGIC = 0x1A2B3C4D
_LENGTH_UNKNOWN = -1
_OPTION_TSRESOL = 9
_NANOSECONDS = 9
_BUFFER_BYTES = 1 << 20

_DONT_FRAGMENT = 0x4000
_TTL = 64
_UDP_PROTOCOL = 17
_IPV4_BYTES, _IPV6_BYTES, _UDP_BYTES = 20, 40, 8


def encapsulate(source: Endpoint, destination: Endpoint, packet: bytes | memoryview) -> bytes:
    """The IP packet that carries a RoCE packet: identification 0, DF, TTL 64, no UDP checksum.

    These are what nopin's ends agree on, so a dissector finds their ICRC right.
    """
    udp_bytes = _UDP_BYTES + len(packet)
    udp = struct.pack(">HHHH", source.port, destination.port, udp_bytes, 0)
    if not is_ipv4(source.gid):
        head = struct.pack(">IHBB", 6 << 28, udp_bytes, _UDP_PROTOCOL, _TTL)
        return b"".join((head, source.gid, destination.gid, udp, packet))
    addresses = source.gid[12:] + destination.gid[12:]
    fields = (0x45, 0, _IPV4_BYTES + udp_bytes, 0, _DONT_FRAGMENT, _TTL, _UDP_PROTOCOL)
    checksum = _checksum(struct.pack(">BBHHHBBH", *fields, 0) + addresses)
    return b"".join((struct.pack(">BBHHHBBH", *fields, checksum), addresses, udp, packet))


def _checksum(header: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class PcapngWriter:
    """A capture file with one interface of raw IP packets and nanosecond times.

    Raises:
        OSError: the file cannot be written; from `write`, `flush` and `close` too.
    """

    def __init__(self, path: str | FilePath) -> None:
        self._file = FilePath(path).open("wb", buffering=_BUFFER_BYTES)  # noqa: SIM115  # closed by `close`
        self._block(_SECTION, struct.pack("<IHHq", _BYTE_ORDER_MAGIC, 1, 0, _LENGTH_UNKNOWN))
        options = struct.pack("<HHB3xHH", _OPTION_TSRESOL, 1, _NANOSECONDS, 0, 0)
        self._block(_INTERFACE, struct.pack("<HHI", LINKTYPE_RAW, 0, 0) + options)

    def write(self, packet: bytes, time_ns: int) -> None:
        """Append one IP packet; time_ns counts from 1970."""
        n_bytes = len(packet)
        head = struct.pack("<IIIII", 0, time_ns >> 32 & 0xFFFFFFFF, time_ns & 0xFFFFFFFF, n_bytes, n_bytes)
        self._block(_PACKET, head + packet + bytes(-n_bytes & 3))

    def flush(self) -> None:
        """Hand everything so far to the kernel."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _block(self, kind: int, body: bytes) -> None:
        n_bytes = 12 + len(body)
        self._file.write(struct.pack("<II", kind, n_bytes) + body + struct.pack("<I", n_bytes))


class PcapLink(Wrapper):
    """Records every packet that passes, both ways.

    The headers are made up (see `encapsulate`): a foreign sender's identification is not shown. When the file
    can no longer be written, recording ends and the packets go on.

    Args:
        inner: the link to watch.
        path: the file, overwritten.
        clock_offset_ns: added to `now` to get nanoseconds since 1970.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, inner: Link, path: str | FilePath, clock_offset_ns: int = 0) -> None:
        super().__init__(inner)
        self._writer: PcapngWriter | None = PcapngWriter(path)
        self._clock_offset_ns = clock_offset_ns
        self._n_captured = 0
        self._n_missed = 0

    def send(self, batch: TxBatch, now: int) -> None:
        """Record, then send."""
        local, remote = batch.path
        for offset, length in packets_of(batch.segments):
            self._record(now, local, remote, batch.staging.view[offset : offset + length])
        self._flush()
        self.inner.send(batch, now)

    def receive(self, now: int) -> Iterator[PacketBatch]:
        """Record what arrives on its way up."""
        for batch in self.inner.receive(now):
            local, remote = batch.path
            view = batch.buffer.data
            for offset, length in zip(batch.offsets.tolist(), batch.lengths.tolist(), strict=True):
                self._record(now, remote, local, view[offset : offset + length])
            self._flush()
            yield batch

    def close(self) -> None:
        """Finish the file, then close the inner link."""
        self._stop_recording()
        self.inner.close()

    def statistics(self) -> dict[str, int]:
        """Packets recorded, and those that passed after recording had to end; then the inner link's."""
        own = {"captured": self._n_captured, "capture_missed": self._n_missed}
        return {**own, **self.inner.statistics()}

    def _record(self, now: int, source: Endpoint, destination: Endpoint, packet: memoryview) -> None:
        if self._writer is None:
            self._n_missed += 1
            return
        try:
            self._writer.write(encapsulate(source, destination, packet), now + self._clock_offset_ns)
            self._n_captured += 1
        except OSError:
            self._n_missed += 1
            self._stop_recording()

    def _flush(self) -> None:
        """Hand everything so far to the kernel: who looks at the file, or kills us, finds whole batches."""
        if self._writer is None:
            return
        try:
            self._writer.flush()
        except OSError:
            self._stop_recording()

    def _stop_recording(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        with suppress(OSError):  # the disk is full, and the part on it is what there is
            writer.close()
