"""Attributes of a queue pair: what `modify` takes and `query` returns.

A field that is None is not in the attribute mask. Which fields a state change requires and allows is in
`qp.py`; a field outside that set is EINVAL and changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

RD_ATOMIC_MAX = 128
"""READs and atomics under way at once, each way: cards have 16, but with so few a server of ours waits for most of a
round trip (64 KiB READs reach half as much, those of 8 bytes a fifth)."""


@dataclass(slots=True, kw_only=True)
class AddressVector:
    """Where the peer is.

    Attributes:
        gid: 16 bytes; IPv4 a.b.c.d is ::ffff:a.b.c.d.
        port: the peer's UDP port; 4791 unless the connection exchange said otherwise.
        foreign: the peer is not nopin: send packets one by one, so that the IP id is predictable.
    """

    gid: bytes
    port: int = 4791
    foreign: bool = False


@dataclass(slots=True, kw_only=True)
class QpAttr:
    """Attributes for `modify_qp`, names as in ``ibv_qp_attr``.

    Units: `timeout` and `min_rnr_timer` are the verbs' codes, `path_mtu` is in bytes (256 ... 4096), PSNs are
    24 bits.
    """

    state: int | None = None
    cur_state: int | None = None
    access: int | None = None
    pkey_index: int | None = None
    port_num: int | None = None
    av: AddressVector | None = None
    path_mtu: int | None = None
    dest_qpn: int | None = None
    rq_psn: int | None = None
    sq_psn: int | None = None
    max_rd_atomic: int | None = None
    max_dest_rd_atomic: int | None = None
    min_rnr_timer: int | None = None
    timeout: int | None = None
    retry_cnt: int | None = None
    rnr_retry: int | None = None


@dataclass(slots=True, kw_only=True, frozen=True)
class QpCaps:
    """Capacity of a queue pair, names as in ``ibv_qp_cap``."""

    max_send_wr: int = 128
    max_recv_wr: int = 128
    max_send_sge: int = 4
    max_recv_sge: int = 4
    max_inline: int = 64
