"""Packet sequence numbers: 24 bits, compared within half the circle.

Source: IBTA volume 1, section 9.7.2; `psn_compare` of the Linux Soft-RoCE driver.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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


def psn_run(first: int, n: int) -> NDArray[np.uint32]:
    """The PSNs of n packets in a row, (n,) uint32."""
    return (np.arange(first, first + n, dtype=np.uint32)) & np.uint32(PSN_MASK)


def psn_diffs(psns: NDArray[np.uint32], base: int) -> NDArray[np.int32]:
    """`psn_diff` of each PSN against base, (n,) int32."""
    shifted = (psns - np.uint32(base)) << np.uint32(8)
    return shifted.view(np.int32) >> 8
