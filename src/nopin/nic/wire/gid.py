"""GIDs: the 16 bytes that name an end. IPv4 a.b.c.d is ::ffff:a.b.c.d and means IPv4 packets."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address

GID_BYTES = 16
V4_PREFIX = bytes(10) + b"\xff\xff"


def gid_of(address: str) -> bytes:
    """The GID of an IPv4 or IPv6 address in text; a scope (``%eth0``) is not part of it.

    Raises:
        ValueError: the text is no address.
    """
    parsed = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv4Address):
        return V4_PREFIX + parsed.packed
    return parsed.packed


def address_of(gid: bytes) -> str:
    """The address of a GID in text, IPv4 where it is one.

    Raises:
        ValueError: not 16 bytes.
    """
    if len(gid) != GID_BYTES:
        raise ValueError(f"a GID has {GID_BYTES} bytes, not {len(gid)}")
    return str(ip_address(gid[12:] if is_ipv4(gid) else gid))


def is_ipv4(gid: bytes) -> bool:
    """Whether packets to this GID are IPv4 packets."""
    return gid[:12] == V4_PREFIX
