"""Captures: read back by scapy, with headers, times and order intact; and a disk that fills up."""

from __future__ import annotations

import errno
from pathlib import Path as FilePath

import numpy as np
import pytest

from nopin.link.memory import MemoryNetwork, memory_pair
from nopin.link.pcap import PcapLink, PcapngWriter
from nopin.mm.space import Staging
from nopin.nic.wire import icrc
from nopin.nic.wire.batch import Endpoint, Path, Segment, TxBatch
from nopin.nic.wire.bth import Bth
from nopin.nic.wire.gid import gid_of
from nopin.nic.wire.opcodes import Opcode


def one_packet(path: Path, psn: int, n_bytes: int) -> TxBatch:
    staging = Staging.of_size(n_bytes)
    Bth(Opcode.SEND_ONLY, 7, psn).emit(staging.view)
    icrc.seal(staging.array, np.array([0]), np.array([n_bytes]), path)
    return TxBatch(path, staging, [Segment(0, n_bytes, n_bytes)])


@pytest.mark.parametrize("addresses", [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")])
def test_scapy_reads_the_capture(tmp_path: FilePath, addresses: tuple[str, str]) -> None:
    scapy = pytest.importorskip("scapy.all", reason="scapy is not installed")
    roce = pytest.importorskip("scapy.contrib.roce", reason="scapy is not installed")
    network = MemoryNetwork()
    near, far = (network.link(Endpoint(gid_of(address), 4791)) for address in addresses)
    since_1970 = 1_700_000_000_000_000_000
    link = PcapLink(near, tmp_path / "x.pcapng", since_1970)
    out, back = Path(near.endpoint, far.endpoint), Path(far.endpoint, near.endpoint)
    link.send(one_packet(out, 1, 20), 1_000)
    link.send(one_packet(out, 2, 21), 2_000)
    far.send(one_packet(back, 3, 400), 0)
    assert len(list(link.receive(3_001))) == 1
    link.close()

    packets = scapy.rdpcap(str(tmp_path / "x.pcapng"))
    assert [packet[roce.BTH].psn for packet in packets] == [1, 2, 3]
    layers = [packet.getlayer("IP") or packet.getlayer("IPv6") for packet in packets]
    assert [(ip.src, ip.dst) for ip in layers] == [addresses, addresses, addresses[::-1]]
    assert [int(packet.time * 10**9) - since_1970 for packet in packets] == [1_000, 2_000, 3_001]
    for packet in packets:
        assert packet[roce.BTH].compute_icrc(b"") == bytes(packet)[-4:]
    if addresses[0] == "192.0.2.1":
        sums = [ip.chksum for ip in layers]
        for ip in layers:
            del ip.chksum
        assert [type(ip)(bytes(ip)).chksum for ip in layers] == sums


def test_capture_passes_packets_on_unchanged(tmp_path: FilePath) -> None:
    near, far = memory_pair()
    link = PcapLink(near, tmp_path / "x.pcapng")
    batch = one_packet(Path(near.endpoint, far.endpoint), 1, 40)
    link.send(batch, 0)
    (got,) = far.receive(0)
    assert got.buffer.tobytes() == batch.staging.array.tobytes()
    assert link.statistics()["captured"] == 1
    link.close()
    link.close()


def test_a_packet_is_in_the_file_as_soon_as_it_has_passed(tmp_path: FilePath) -> None:
    near, far = memory_pair()
    file = tmp_path / "x.pcapng"
    link = PcapLink(near, file)
    before = file.stat().st_size
    link.send(one_packet(Path(near.endpoint, far.endpoint), 1, 40), 0)
    sent = file.stat().st_size
    assert sent > before
    far.send(one_packet(Path(far.endpoint, near.endpoint), 1, 40), 0)
    assert len(list(link.receive(1))) == 1
    assert file.stat().st_size > sent
    link.close()


def test_a_full_disk_ends_the_capture_but_not_the_traffic(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = memory_pair()
    link = PcapLink(near, tmp_path / "x.pcapng")

    def full(self: PcapngWriter, packet: bytes, time_ns: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PcapngWriter, "write", full)
    for psn in range(3):
        link.send(one_packet(Path(near.endpoint, far.endpoint), psn, 40), 0)
    assert len(list(far.receive(0))) == 3
    assert link.statistics()["capture_missed"] == 3
    link.close()
