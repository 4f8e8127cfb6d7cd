"""Raw IPv4 sockets that see the IP header of UDP packets to one port."""

from __future__ import annotations

import ctypes
import socket
import struct

from nopin.linux.udp import BUFFER_BYTES

_SO_ATTACH_FILTER = 26

# Classic BPF, as tcpdump -d prints it: x = IP header length; accept when the UDP destination port matches.
_LOAD_HEADER_LENGTH = 0xB1
_LOAD_HALF_AT_X = 0x48
_JUMP_IF_EQUAL = 0x15
_RETURN = 0x06
_UDP_DESTINATION_PORT_AT = 2
_WHOLE_PACKET = 0xFFFFFFFF


def open_raw_udp(address: str, port: int) -> socket.socket:
    """A non-blocking raw socket that receives copies of the UDP packets to address and port, IP header first.

    The kernel still delivers the packets to datagram sockets, and answers ICMP port unreachable where none is
    bound: keep one beside this.

    Raises:
        PermissionError: without CAP_NET_RAW.
        OSError: the address is not ours.
    """
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 17)
    try:
        _accept_only_port(raw, port)
        raw.bind((address, 0))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    except OSError:
        raw.close()
        raise
    return raw


def _accept_only_port(raw: socket.socket, port: int) -> None:
    program = b"".join(
        struct.pack("HBBI", code, if_true, if_false, operand)
        for code, if_true, if_false, operand in (
            (_LOAD_HEADER_LENGTH, 0, 0, 0),
            (_LOAD_HALF_AT_X, 0, 0, _UDP_DESTINATION_PORT_AT),
            (_JUMP_IF_EQUAL, 0, 1, port),
            (_RETURN, 0, 0, _WHOLE_PACKET),
            (_RETURN, 0, 0, 0),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))  # alive until the kernel has copied it
    descriptor = struct.pack("HP", len(program) // 8, ctypes.addressof(code))
    raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, descriptor)
