"""Packet sequence numbers: 24 bits, compared within half the circle.

Source: IBTA volume 1, section 9.7.2; `psn_compare` of the Linux Soft-RoCE driver.
"""

from __future__ import annotations

PSN_BITS = 24
PSN_MASK = (1 << PSN_BITS) - 1
PSN_HALF = 1 << (PSN_BITS - 1)
"""At most this many PSNs may be outstanding; a distance this large counts as older."""


def psn_add(psn: int, n: int) -> int:
    """The PSN n packets later (n may be negative)."""
    return (psn + n) & PSN_MASK


def psn_diff(a: int, b: int) -> int:
    """How far a is ahead of b, in [-2^23, 2^23); negative when a is older."""
    return ((a - b + PSN_HALF) & PSN_MASK) - PSN_HALF
