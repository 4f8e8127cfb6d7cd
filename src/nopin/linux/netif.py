"""Network interfaces: which one has an address, and how large its packets may be."""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from pathlib import Path

_SIOCGIFCONF = 0x8912
_SIOCGIFMTU = 0x8921
_IFREQ_BYTES = 40
_NAME_BYTES = 16
_ADDRESS_AT = 20
"""In an ifreq: 16 bytes of name, then a sockaddr_in whose address starts 4 bytes in."""

_LOOPBACK_NET = IPv4Network("127.0.0.0/8")
_MAX_ADDRESSES = 4096


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address; None when none has.

    Every address of 127.0.0.0/8 is the loopback's, whether listed or not.

    Raises:
        ValueError: the text is no address.
    """
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address):
        return _ipv6_interfaces().get(parsed)
    if parsed in _LOOPBACK_NET:
        return "lo"
    return _ipv4_interfaces().get(parsed)


def interface_mtu(name: str) -> int:
    """The interface's MTU in bytes, IP header included; OSError when there is no such interface."""
    request = struct.pack(f"{_NAME_BYTES}sI20x", name.encode(), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFMTU, request)
    return int(struct.unpack_from("I", answer, _NAME_BYTES)[0])


def scope_id(address: str) -> int:
    """Interface index of a link-local IPv6 address, by its ``%name`` or else by who has it; 0 for others."""
    text, _, name = address.partition("%")
    parsed = ip_address(text)
    if not (isinstance(parsed, IPv6Address) and parsed.is_link_local):
        return 0
    interface = name or interface_of(text)
    return socket.if_nametoindex(interface) if interface else 0


def _ipv4_interfaces() -> dict[IPv4Address, str]:
    table = ctypes.create_string_buffer(_MAX_ADDRESSES * _IFREQ_BYTES)
    request = struct.pack("iP", len(table), ctypes.addressof(table))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFCONF, request)
    (n_bytes,) = struct.unpack_from("i", answer)
    found: dict[IPv4Address, str] = {}
    for at in range(0, n_bytes, _IFREQ_BYTES):
        label = table.raw[at : at + _NAME_BYTES].partition(b"\0")[0].decode()
        packed = table.raw[at + _ADDRESS_AT : at + _ADDRESS_AT + 4]
        found[IPv4Address(packed)] = label.partition(":")[0]  # eth0:1 is an alias label of eth0
    return found


def _ipv6_interfaces() -> dict[IPv6Address, str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:  # a kernel without IPv6
        return {}
    fields = [line.split() for line in lines]
    return {IPv6Address(bytes.fromhex(line[0])): line[-1] for line in fields}
