"""A packet in one line of words."""

from __future__ import annotations

from nopin.nic.wire.aeth import Aeth, Nak, SyndromeKind, rnr_ns
from nopin.nic.wire.bth import Bth
from nopin.nic.wire.headers import AtomicEth, Reth, parse_atomic_ack, parse_u32
from nopin.nic.wire.opcodes import (
    AETH_BYTES,
    BTH_BYTES,
    CNP_OPCODE,
    HAS_AETH,
    HAS_ATOMIC_ACK_ETH,
    HAS_ATOMIC_ETH,
    HAS_IETH,
    HAS_IMM,
    HAS_RETH,
    HEADER_BYTES,
    ICRC_BYTES,
    IS_KNOWN,
    MIN_PACKET_BYTES,
    RETH_BYTES,
    Opcode,
)
from nopin.units import US_NS


def describe(packet: memoryview) -> str:
    """Name the opcode, and list the fields that mean something in it. Never fails, whatever the bytes."""
    if len(packet) < MIN_PACKET_BYTES:
        return f"too short: {len(packet)} bytes"
    bth = Bth.parse(packet)
    if not IS_KNOWN[bth.opcode]:
        name = "CNP" if bth.opcode == CNP_OPCODE else f"opcode {bth.opcode:#04x}"
        return f"{name} {_bth_words(bth)} {len(packet)} bytes"
    header_bytes = int(HEADER_BYTES[bth.opcode])
    name = Opcode(bth.opcode).name
    n_payload = len(packet) - header_bytes - bth.pad - ICRC_BYTES
    if n_payload < 0:
        return f"{name} {_bth_words(bth)} cut off at {len(packet)} bytes"
    words = [name, _bth_words(bth), *_extension_words(bth.opcode, packet)]
    if n_payload:
        words.append(f"payload {n_payload}")
    return " ".join(words)


def _bth_words(bth: Bth) -> str:
    marks = [
        mark
        for mark, is_set in (
            ("ack-req", bth.ack_req),
            ("solicited", bth.solicited),
            ("fecn", bth.fecn),
            ("becn", bth.becn),
            (f"version {bth.version}", bth.version),
        )
        if is_set
    ]
    return " ".join([f"qpn {bth.qpn:#x} psn {bth.psn:#x}", *marks])


def _extension_words(opcode: int, packet: memoryview) -> list[str]:
    words: list[str] = []
    at = BTH_BYTES
    if HAS_RETH[opcode]:
        reth = Reth.parse(packet, at)
        words.append(f"address {reth.address:#x} rkey {reth.rkey:#x} length {reth.length}")
        at += RETH_BYTES
    if HAS_ATOMIC_ETH[opcode]:
        atomic = AtomicEth.parse(packet, at)
        words.append(f"address {atomic.address:#x} rkey {atomic.rkey:#x}")
        words.append(f"operands {atomic.swap_or_add:#x} {atomic.compare:#x}")
    if HAS_AETH[opcode]:
        words.append(_aeth_words(Aeth.parse(packet, at)))
        at += AETH_BYTES
    if HAS_ATOMIC_ACK_ETH[opcode]:
        words.append(f"original {parse_atomic_ack(packet, at):#x}")
    if HAS_IMM[opcode]:
        words.append(f"imm {parse_u32(packet, at):#x}")
    if HAS_IETH[opcode]:
        words.append(f"invalidate {parse_u32(packet, at):#x}")
    return words


def _aeth_words(aeth: Aeth) -> str:
    if aeth.kind == SyndromeKind.ACK:
        return f"ack msn {aeth.msn}"
    if aeth.kind == SyndromeKind.RNR_NAK:
        return f"rnr-nak wait {rnr_ns(aeth.value) // US_NS} us msn {aeth.msn}"
    if aeth.syndrome in set(Nak):  # 3.11 wants a member on the left of `in Nak`
        return f"nak {Nak(aeth.syndrome).name.lower().replace('_', '-')} msn {aeth.msn}"
    return f"syndrome {aeth.syndrome:#04x} msn {aeth.msn}"
