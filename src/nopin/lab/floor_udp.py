"""The packet floor: UDP with segmentation offload between two processes, with or without CRC.

Without CRC: fixed bytes are sent and received. With CRC, everything that RoCEv2 cannot avoid is done to every
packet and nothing else: payload placed into packets, ICRC computed, received, ICRC verified, payload copied
to its place. No headers are written or read, no queue pair, no acknowledgement but a rough window.
"""

from __future__ import annotations

import select
import socket
import time
from itertools import repeat
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from numpy.typing import NDArray

from nopin.errors import PeerError
from nopin.lab.child import Child
from nopin.lab.line import Line

SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33

HEADER_BYTES = 12
ICRC_BYTES = 4
CALL_BYTES_MAX = 65507
CALL_PACKETS_MAX = 64
"""Segments per call: 64 on every kernel with UDP_SEGMENT, 128 on recent ones."""
SOCKET_BUFFER_BYTES = 16 << 20
PLACE_BYTES = 1 << 20
"""Payload goes from and to a buffer of this size, over and over, as perftest does."""
CREDIT_CALLS = 8
CREDIT_TIMEOUT_S = 0.05
_SEED = 0xDEBB20E3


class Packets:
    """The packets of one call in a buffer, with every view of them made once.

    A packet is HEADER_BYTES, payload, ICRC_BYTES; as many as one call takes.
    """

    def __init__(self, payload_bytes: int) -> None:
        self.stride = HEADER_BYTES + payload_bytes + ICRC_BYTES
        self.n_packets = min(CALL_PACKETS_MAX, CALL_BYTES_MAX // self.stride)
        self.payload_bytes = self.n_packets * payload_bytes
        self.buffer = np.zeros(CALL_BYTES_MAX + 1, np.uint8)
        self.view = self.buffer.data
        self.n_bytes = self.n_packets * self.stride
        packets = self.buffer[: self.n_bytes].reshape(self.n_packets, self.stride)
        self.payload = packets[:, HEADER_BYTES:-ICRC_BYTES]
        self._icrc = packets[:, -ICRC_BYTES:]
        starts = range(0, self.n_bytes, self.stride)
        self._checked = [self.view[start : start + self.stride - ICRC_BYTES] for start in starts]

    def crcs(self) -> NDArray[np.uint8]:
        """Compute every packet's CRC, as it lies in the packet: shape (n_packets, 4)."""
        values = np.fromiter(map(crc32, self._checked, repeat(_SEED)), "<u4", self.n_packets)
        return values.view(np.uint8).reshape(self.n_packets, ICRC_BYTES)

    def seal(self) -> None:
        """Write every packet's CRC."""
        self._icrc[:] = self.crcs()

    def intact(self) -> bool:
        """Tell whether every packet's CRC is right."""
        return bool((self._icrc == self.crcs()).all())


class UdpFloor:
    """Payload rate of the bare packet path over loopback, in `Floor` form."""

    unit = "bytes_per_s"

    def __init__(self, *, crc: bool, payload_bytes: int = 4096) -> None:
        self.name = "udp_crc" if crc else "udp"
        self._crc = crc
        self._packets = Packets(payload_bytes)
        n_places = max(1, PLACE_BYTES // self._packets.payload_bytes)
        self._places = np.ones((n_places, *self._packets.payload.shape), np.uint8)
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", 0))
        _enlarge(self._sock, SO_SNDBUFFORCE, socket.SO_SNDBUF)
        self._sock.settimeout(CREDIT_TIMEOUT_S)
        self._sock.setsockopt(SOL_UDP, UDP_SEGMENT, self._packets.stride)
        self._sink = Child(_sink, payload_bytes, crc)
        port, buffer_bytes = self._sink.line.receive(30)
        self._sock.connect(("127.0.0.1", port))
        self._window_calls = max(CREDIT_CALLS, min(4 * CREDIT_CALLS, buffer_bytes // 4 // CALL_BYTES_MAX))

    def measure(self, seconds: float) -> float:
        """Send for that long; return payload bytes per second as counted by the receiver."""
        self._sink.ask("start")
        start = time.perf_counter()
        end = start + seconds
        outstanding = 0
        place = 0
        while time.perf_counter() < end:
            while outstanding >= self._window_calls:
                outstanding -= self._await_credit(outstanding)
            if self._crc:
                self._packets.payload[:] = self._places[place]
                self._packets.seal()
                place = (place + 1) % len(self._places)
            self._sock.send(self._packets.view[: self._packets.n_bytes])
            outstanding += 1
        while outstanding >= CREDIT_CALLS:
            outstanding -= self._await_credit(outstanding)
        elapsed = time.perf_counter() - start
        n_bytes, n_bad = self._sink.ask("stop")
        if n_bad:
            raise PeerError(f"{n_bad} calls arrived with a wrong CRC over loopback")
        return float(n_bytes) / elapsed

    def _await_credit(self, outstanding: int) -> int:
        try:
            self._sock.recv(64)
        except TimeoutError:
            return outstanding  # some were lost: the receiver counts what came, we start a new window
        return CREDIT_CALLS

    def close(self) -> None:
        """End the receiving process."""
        self._sock.close()
        self._sink.close()


def _enlarge(sock: socket.socket, forced: int, allowed: int) -> None:
    """Make a socket buffer large: by force, or without privilege as far as the host's limit."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, SOCKET_BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, allowed, SOCKET_BUFFER_BYTES)


def _sink(line: Line[Any], payload_bytes: int, crc: bool) -> None:
    """Receive, verify and place packets; between measurements wait for the next word."""
    packets = Packets(payload_bytes)
    n_places = max(1, PLACE_BYTES // packets.payload_bytes)
    places = np.ones((n_places, *packets.payload.shape), np.uint8)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    _enlarge(sock, SO_RCVBUFFORCE, socket.SO_RCVBUF)
    sock.setsockopt(SOL_UDP, UDP_GRO, 1)
    sock.bind(("127.0.0.1", 0))
    line.send([sock.getsockname()[1], sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)])
    while line.receive() == "start":
        line.send("started")
        line.send(_receive_all(sock, packets, places, line, crc=crc))


def _receive_all(
    sock: socket.socket, packets: Packets, places: NDArray[np.uint8], line: Line[Any], *, crc: bool
) -> list[int]:
    """Receive until the line speaks and the socket is empty; return payload bytes and calls with bad CRCs."""
    n_calls = n_bad = place = 0
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(line, select.POLLIN)
    sock.setblocking(False)
    while True:
        try:
            n_bytes, peer = sock.recvfrom_into(packets.view)
        except BlockingIOError:
            if all(fd == line.fileno() for fd, _ in poller.poll()):
                break
            continue
        if n_bytes != packets.n_bytes:
            continue
        if crc:
            n_bad += not packets.intact()
            places[place] = packets.payload
            place = (place + 1) % len(places)
        n_calls += 1
        if n_calls % CREDIT_CALLS == 0:
            sock.sendto(b"credit", peer)
    line.receive()
    return [n_calls * packets.payload_bytes, n_bad]
