"""UDP datagrams by the dozen: sockets set up for RoCEv2, and batched calls with segmentation offload.

`BatchReceiver` and `BatchSender` own the C structures of recvmmsg and sendmmsg as numpy arrays that are built
once; a call then costs a few vector stores and one system call for up to a megabyte. Pure mechanism: which
errors matter, and what a datagram means, is the caller's business.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from ipaddress import ip_address
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nopin.linux.libc import LIBC
from nopin.linux.netif import scope_id
from nopin.mm.space import Bytes

UDP_SEGMENT = 103
UDP_GRO = 104
_UDP_NO_CHECK6_RX = 102
_SOL_UDP = 17
_IP_MTU_DISCOVER = 10
_IPV6_MTU_DISCOVER = 23
_PMTUDISC_DO = 2
_SO_RCVBUFFORCE = 33
_SO_SNDBUFFORCE = 32
_SO_MEMINFO = 55
_MEMINFO_DROPS = 8
_TTL = 64

BUFFER_BYTES = 16 << 20
"""Socket buffers asked for; the kernel may give less."""

MAX_DATAGRAM_BYTES = 1 << 16
ADDRESS_BYTES = 28
"""A sockaddr_in6; a sockaddr_in takes the first 16 bytes."""

_MMSGHDR = np.dtype(
    {
        "names": ["name", "namelen", "iov", "iovlen", "control", "controllen", "flags", "length"],
        "formats": ["<u8", "<u4", "<u8", "<u8", "<u8", "<u8", "<i4", "<u4"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56],
        "itemsize": 64,
    }
)
_IOVEC = np.dtype([("base", "<u8"), ("length", "<u8")])
_CONTROL = np.dtype([("length", "<u8"), ("level", "<i4"), ("type", "<i4"), ("value", "<u4"), ("pad", "<u4")])
_CONTROL_HEADER_BYTES = 16
_GRO_CONTROL_BYTES = socket.CMSG_SPACE(4)

LIBC.recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
LIBC.sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)


def open_datagram(address: str, port: int, *, receive_bytes: int = BUFFER_BYTES) -> socket.socket:
    """A non-blocking, unconnected UDP socket bound to one address, whose IPv4 packets have id 0 and DF.

    The identification is predictable only for unconnected sockets that forbid fragmentation, and the ICRC
    covers it. IPv6 receives datagrams without a UDP checksum, which RoCEv2 senders make.

    Raises:
        OSError: the address is not ours, or the port is taken.
        ValueError: the text is no address.
    """
    is_ipv6 = ip_address(address.partition("%")[0]).version == 6
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if is_ipv6:
            _configure_ipv6(bound)
            bound.bind((address.partition("%")[0], port, 0, scope_id(address)))
        else:
            bound.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DO)
            bound.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, _TTL)
            bound.bind((address, port))
        _grow(bound, _SO_RCVBUFFORCE, socket.SO_RCVBUF, receive_bytes)
        _grow(bound, _SO_SNDBUFFORCE, socket.SO_SNDBUF, BUFFER_BYTES)
    except OSError:
        bound.close()
        raise
    return bound


def _configure_ipv6(bound: socket.socket) -> None:
    bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    bound.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DO)
    bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, _TTL)
    bound.setsockopt(_SOL_UDP, _UDP_NO_CHECK6_RX, 1)


def _grow(bound: socket.socket, force: int, ask: int, n_bytes: int) -> None:
    """Set a buffer size: beyond the system's limit where we may, up to it otherwise."""
    try:
        bound.setsockopt(socket.SOL_SOCKET, force, n_bytes)
    except PermissionError:
        bound.setsockopt(socket.SOL_SOCKET, ask, n_bytes)


def enable_gro(bound: socket.socket) -> bool:
    """Ask for merged datagrams; False when this kernel has none, and each comes alone."""
    try:
        bound.setsockopt(_SOL_UDP, UDP_GRO, 1)
    except OSError:
        return False
    return True


def kernel_drops(bound: socket.socket) -> int:
    """Datagrams the kernel dropped because this socket's buffer was full."""
    words = bound.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * (_MEMINFO_DROPS + 1))
    return int(struct.unpack_from("I", words, 4 * _MEMINFO_DROPS)[0])


def pack_address(packed_ip: bytes, port: int, scope: int = 0) -> bytes:
    """A sockaddr for an address of 4 or 16 bytes, padded to `ADDRESS_BYTES`."""
    if len(packed_ip) == 4:
        bare = struct.pack("=H", socket.AF_INET) + struct.pack(">H4s", port, packed_ip)
        return bare.ljust(ADDRESS_BYTES, b"\0")
    head = struct.pack("=H", socket.AF_INET6) + struct.pack(">HI16s", port, 0, packed_ip)
    return head + struct.pack("=I", scope)


def unpack_address(sockaddr: bytes) -> tuple[bytes, int]:
    """Address (4 or 16 bytes) and port of a sockaddr."""
    (family,) = struct.unpack_from("=H", sockaddr)
    (port,) = struct.unpack_from(">H", sockaddr, 2)
    return (sockaddr[8:24] if family == socket.AF_INET6 else sockaddr[4:8]), port


LoneDatagram = tuple[int, int, tuple[Any, ...]]
"""What came into slot 0 by itself: bytes, size of the datagrams merged into it, and the sender's address."""


class BatchReceiver:
    """Receives many datagrams per system call, each into a slot of one buffer; or one, at half the price.

    Attributes:
        buffer: uint8, n_slots x slot_bytes; slot i starts at i x slot_bytes.
        slot_bytes: a longer datagram is cut.
        lengths: (n_slots,) uint32, bytes in each slot after `receive`.
        segment_bytes: (n_slots,) uint32, size of the datagrams merged into the slot; its own when just one.
    """

    def __init__(self, bound: socket.socket, n_slots: int, slot_bytes: int = MAX_DATAGRAM_BYTES) -> None:
        self._fd = bound.fileno()
        self._receive_message = bound.recvmsg_into
        self._n_slots = n_slots
        self.slot_bytes = slot_bytes
        self.buffer: Bytes = np.zeros(n_slots * slot_bytes, np.uint8)
        self._first_slot = [self.buffer.data[:slot_bytes]]
        self._names = np.zeros((n_slots, ADDRESS_BYTES), np.uint8)
        self._control = np.zeros(n_slots, _CONTROL)
        self._iov = np.zeros(n_slots, _IOVEC)
        self._headers = np.zeros(n_slots, _MMSGHDR)
        slots = np.arange(n_slots, dtype=np.uint64)
        self._iov["base"] = self.buffer.ctypes.data + slots * slot_bytes
        self._iov["length"] = slot_bytes
        self._headers["name"] = self._names.ctypes.data + slots * ADDRESS_BYTES
        self._headers["iov"] = self._iov.ctypes.data + slots * _IOVEC.itemsize
        self._headers["iovlen"] = 1
        self._headers["control"] = self._control.ctypes.data + slots * _CONTROL.itemsize
        self._address = self._headers.ctypes.data
        self._namelen = self._headers["namelen"]
        self._controllen = self._headers["controllen"]
        self._control_type = self._control["type"]
        self._control_value = self._control["value"]
        self.lengths: NDArray[np.uint32] = self._headers["length"]
        self.segment_bytes: NDArray[np.uint32] = np.zeros(n_slots, np.uint32)

    def receive(self) -> int:
        """Fill slots with what has arrived; returns how many, 0 when nothing is there.

        Raises:
            OSError: an error reported against the socket, for example by ICMP; the next call goes on.
        """
        self._namelen[:] = ADDRESS_BYTES
        self._controllen[:] = _CONTROL.itemsize
        self._control_type[:] = 0
        n = LIBC.recvmmsg(self._fd, self._address, self._n_slots, 0, None)
        if n < 0:
            number = ctypes.get_errno()
            if number in (errno.EAGAIN, errno.EINTR):
                return 0
            raise OSError(number, f"recvmmsg: {os.strerror(number)}")
        merged = self._control_type[:n] == UDP_GRO
        self.segment_bytes[:n] = np.where(merged, self._control_value[:n], self.lengths[:n])
        return int(n)

    def receive_one(self) -> LoneDatagram | None:
        """Receive one datagram into slot 0, leaving `lengths` and the like alone; None when nothing is there.

        Raises:
            OSError: as `receive`.
        """
        try:
            length, control, _, source = self._receive_message(self._first_slot, _GRO_CONTROL_BYTES)
        except (BlockingIOError, InterruptedError):
            return None
        for level, kind, data in control:
            if level == _SOL_UDP and kind == UDP_GRO:
                return length, int.from_bytes(data[:4], "little"), source
        return length, length, source

    def sources(self, n: int) -> bytes:
        """The sockaddrs of the first n slots, `ADDRESS_BYTES` each, zero padded."""
        return self._names[:n].tobytes()


class BatchSender:
    """Sends many datagrams per system call, runs of equal ones as one segmented message.

    Attributes:
        uses_segmentation: cleared for good when the kernel refuses it.
    """

    MAX_MESSAGES = 96

    def __init__(self, fd: int, *, uses_segmentation: bool = True) -> None:
        self._fd = fd
        self.uses_segmentation = uses_segmentation
        n = self.MAX_MESSAGES
        self._name = np.zeros(ADDRESS_BYTES, np.uint8)
        self._control = np.zeros(n, _CONTROL)
        self._iov = np.zeros(n, _IOVEC)
        self._headers = np.zeros(n, _MMSGHDR)
        index = np.arange(n, dtype=np.uint64)
        self._control["length"] = _CONTROL_HEADER_BYTES + 2  # the segment size is 16 bits
        self._control["level"] = _SOL_UDP
        self._control["type"] = UDP_SEGMENT
        self._headers["name"] = self._name.ctypes.data
        self._headers["iov"] = self._iov.ctypes.data + index * _IOVEC.itemsize
        self._headers["iovlen"] = 1
        self._headers["control"] = self._control.ctypes.data + index * _CONTROL.itemsize
        self._address = self._headers.ctypes.data
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._loaded: tuple[tuple[int, int, int], ...] | None = None
        self._base = 0
        self._n_packets: list[int] = [0]
        self._n_bytes: list[int] = [0]

    def aim(self, sockaddr: bytes) -> None:
        """Set the destination of the following messages."""
        self._name[:] = np.frombuffer(sockaddr, np.uint8)
        is_ipv4 = sockaddr[0] == socket.AF_INET
        self._headers["namelen"] = 16 if is_ipv4 else ADDRESS_BYTES

    def load(self, base: int, messages: Sequence[tuple[int, int, int]]) -> None:
        """Set up messages (offset from base, length, segment size), at most `MAX_MESSAGES`, for `send`.

        The same tuple as last time stays loaded: long messages go out in one shape.
        """
        if messages is self._loaded and base == self._base:
            return
        self._loaded, self._base = messages if isinstance(messages, tuple) else None, base
        table = np.array(messages, np.int64)
        n = len(table)
        lengths, sizes = table[:, 1], table[:, 2]
        self._n_packets = list(accumulate((-(-length // size) for _, length, size in messages), initial=0))
        self._n_bytes = list(accumulate((length for _, length, _ in messages), initial=0))
        self._iov["base"][:n] = table[:, 0] + base
        self._iov["length"][:n] = lengths
        self._control["value"][:n] = sizes
        self._headers["controllen"][:n] = np.where(sizes < lengths, _CONTROL.itemsize, 0)

    def send(self, start: int, end: int) -> int:
        """Send loaded messages [start, end); returns how many went out, at least one.

        Raises:
            OSError: the first of them was refused; BlockingIOError when the socket's buffer is full.
        """
        at = self._address + start * _MMSGHDR.itemsize
        n = LIBC.sendmmsg(self._fd, at, end - start, 0)
        if n > 0:
            return int(n)
        number = ctypes.get_errno()
        raise OSError(number, f"sendmmsg: {os.strerror(number)}")

    def sent(self, start: int, end: int) -> tuple[int, int]:
        """Return packets and bytes of loaded messages [start, end)."""
        return self._n_packets[end] - self._n_packets[start], self._n_bytes[end] - self._n_bytes[start]

    def wait_writable(self, timeout_ms: int) -> bool:
        """Wait until the socket takes more; False when it did not in time."""
        return bool(self._poll.poll(timeout_ms))
