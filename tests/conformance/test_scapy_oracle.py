"""scapy, which shares no code with us, builds packets that we must accept, and reads ours."""

from __future__ import annotations

import numpy as np
import pytest

from nopin.link.pcap import encapsulate
from nopin.nic.wire import icrc
from nopin.nic.wire.aeth import SYNDROME_ACK, Aeth, Nak
from nopin.nic.wire.batch import Endpoint, Path
from nopin.nic.wire.bth import Bth
from nopin.nic.wire.gid import gid_of
from nopin.nic.wire.opcodes import Opcode

pytest.importorskip("scapy", reason="scapy is not installed")
from scapy.contrib.roce import AETH, BTH, cnp  # only once we know that it is there
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

V4 = ("198.51.100.7", "203.0.113.9")
V6 = ("2001:db8::7", "2001:db8:1::9")


def path_to(addresses: tuple[str, str], source_port: int) -> Path:
    """The receiver's view of packets from addresses[0] to addresses[1]."""
    return Path(Endpoint(gid_of(addresses[1]), 4791), Endpoint(gid_of(addresses[0]), source_port))


def accepts(frame: bytes, ip_bytes: int, path: Path) -> bool:
    buffer = np.frombuffer(frame, np.uint8)
    words = np.array([int.from_bytes(frame[4:8], "big")], np.uint32) if ip_bytes == 20 else None
    start = ip_bytes + 8
    return bool(icrc.verify(buffer, np.array([start]), np.array([len(frame) - start]), path, words)[0])


@pytest.mark.parametrize("n_bytes", [0, 1, 3, 4, 255, 1024, 4096])
@pytest.mark.parametrize("identification", [0, 1, 0xBEEF])
def test_scapy_ipv4_packets_are_accepted(n_bytes: int, identification: int) -> None:
    pad = -n_bytes & 3
    bth = BTH(opcode="RC_SEND_ONLY", dqpn=0x1234, psn=77, ackreq=1, padcount=pad)
    ip = IP(src=V4[0], dst=V4[1], id=identification, flags="DF", ttl=9, tos=0x10)
    frame = bytes(ip / UDP(sport=50001, dport=4791, chksum=0) / bth / Raw(b"\x5a" * n_bytes + bytes(pad)))
    assert accepts(frame, 20, path_to(V4, 50001))
    assert Bth.parse(frame, 28) == Bth(Opcode.SEND_ONLY, 0x1234, 77, ack_req=True, pad=pad)


@pytest.mark.parametrize("n_bytes", [0, 4, 1024])
def test_scapy_ipv6_packets_are_accepted(n_bytes: int) -> None:
    bth = BTH(opcode="RC_SEND_ONLY", dqpn=0x1234, psn=77)
    ip = IPv6(src=V6[0], dst=V6[1], tc=5, fl=99, hlim=3)
    frame = bytes(ip / UDP(sport=50001, dport=4791, chksum=0) / bth / Raw(b"\x5a" * n_bytes))
    assert accepts(frame, 40, path_to(V6, 50001))


def test_scapy_congestion_notification_is_accepted() -> None:
    frame = bytes(IP(src=V4[0], dst=V4[1], id=4, flags="DF") / UDP(sport=9, dport=4791) / cnp(dqpn=0x77))
    assert accepts(frame, 20, path_to(V4, 9))


@pytest.mark.parametrize("syndrome", [SYNDROME_ACK, Nak.REMOTE_ACCESS_ERROR, 0x2C])
def test_scapy_reads_our_acknowledgement(syndrome: int) -> None:
    path = path_to(V4, 4791)
    buffer = np.full(20, 0xA5, np.uint8)
    view = buffer.data
    Bth(Opcode.ACKNOWLEDGE, 0xABCDEF, 0x123456).emit(view)
    Aeth(syndrome, 0x654321).emit(view, 12)
    ours = Path(path.remote, path.local)
    icrc.seal(buffer, np.array([0]), np.array([20]), ours)
    read = IP(encapsulate(ours.local, ours.remote, buffer.tobytes()))
    assert (read[BTH].dqpn, read[BTH].psn, read[BTH].pkey) == (0xABCDEF, 0x123456, 0xFFFF)
    assert (read[AETH].syndrome, read[AETH].msn) == (syndrome, 0x654321)
    recomputed = read[BTH].compute_icrc(b"")  # from the fields it read; the argument is not used
    assert recomputed == buffer[-4:].tobytes()
