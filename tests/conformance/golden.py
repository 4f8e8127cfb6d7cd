"""Packets whose every byte is known, from the IP header to the ICRC.

G1 to G3 were computed by an independent script. K1 to K3 were captured from Linux Soft-RoCE (kernel 7.2). CNP is
from a published capture of a ConnectX-4 Lx.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nopin.nic.wire.batch import Endpoint, Path
from nopin.nic.wire.gid import V4_PREFIX


class Golden(NamedTuple):
    """One packet: `frame` starts at the IP header, `packet` at the BTH."""

    frame: bytes
    packet: bytes
    source: Endpoint
    destination: Endpoint
    fragment_word: int

    @property
    def received(self) -> Path:
        """The receiver's view of the path."""
        return Path(self.destination, self.source)

    @property
    def sent(self) -> Path:
        """The sender's view of the path."""
        return Path(self.source, self.destination)

    @property
    def words(self) -> NDArray[np.uint32] | None:
        """As `verify` and `seal` take them."""
        is_ipv4 = self.frame[0] >> 4 == 4
        return np.array([self.fragment_word], np.uint32) if is_ipv4 else None


def _golden(text: str) -> Golden:
    frame = bytes.fromhex(text.replace(" ", ""))
    is_ipv4 = frame[0] >> 4 == 4
    udp = 20 if is_ipv4 else 40
    if is_ipv4:
        addresses = V4_PREFIX + frame[12:16], V4_PREFIX + frame[16:20]
    else:
        addresses = frame[8:24], frame[24:40]
    ports = int.from_bytes(frame[udp : udp + 2], "big"), int.from_bytes(frame[udp + 2 : udp + 4], "big")
    ends = [Endpoint(gid, port) for gid, port in zip(addresses, ports, strict=True)]
    return Golden(frame, frame[udp + 8 :], ends[0], ends[1], int.from_bytes(frame[4:8], "big"))


G1 = _golden(
    "45000034000040004011b6b5c0000201c0000202 c12112b700200000 0430ffff00000012807d556168656c6c6f000000 a35f3d99"
)
G2 = _golden(
    "45000048518540004011651cc0000201c0000202 c12112b700340000 0a00ffff00000012807d5562"
    "00007f123456700800000a370000000c 000102030405060708090a0b 50ce2d60"
)
G3 = _golden("45000030000040004011b6b9c0000202c0000201 c12112b7001c0000 1100ffff00000011007d5562 1f000002 3bacbe83")
K1 = _golden(
    "45000050518440004011d47a0a4e00010a4e0002 c12112b7003c0000 0430ffff00000011807d5561" + "7b" * 33 + "000000 74adb6cb"
)
K2 = _golden("450000301622400040110ffd0a4e00020a4e0001 c12112b7001c0000 1100ffff00000011007d5561 1f000001 f5234814")
K3 = _golden(
    "60000000001c1140 fe80000000000000e44385fffe5421ee fe8000000000000094effbfffec445b3 c14412b7001c0000"
    "1100ffff0000001200ac2a6e 1f000001 bfc3a9ff"
)
CNP = _golden(
    "45c2003c718c400040110000 0a001101 0a001201 000012b700280000 8100ffff4000011800000000" + "00" * 16 + "82fd002a"
)

ALL = {"G1": G1, "G2": G2, "G3": G3, "K1": K1, "K2": K2, "K3": K3, "CNP": CNP}
