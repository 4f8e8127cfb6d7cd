"""What each opcode implies, in plain values, for a lone packet: there a look into an array costs more than its use.

All headers of a packet are written by one call, too (`Kind.pack`), because each header by itself costs an object and
two calls.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from nopin.nic.wire.aeth import AETH_FORMAT
from nopin.nic.wire.bth import BTH_FORMAT
from nopin.nic.wire.headers import ATOMIC_ACK_ETH_FORMAT, ATOMIC_ETH_FORMAT, RETH_FORMAT, WORD_FORMAT
from nopin.nic.wire.opcodes import (
    HAS_AETH,
    HAS_ATOMIC_ACK_ETH,
    HAS_ATOMIC_ETH,
    HAS_IETH,
    HAS_IMM,
    HAS_RETH,
    HEADER_BYTES,
    IS_KNOWN,
    IS_READ_RESPONSE,
    IS_REQUEST,
)

_EXTENSIONS = (
    (HAS_RETH, RETH_FORMAT),
    (HAS_ATOMIC_ETH, ATOMIC_ETH_FORMAT),
    (HAS_AETH, AETH_FORMAT),
    (HAS_ATOMIC_ACK_ETH, ATOMIC_ACK_ETH_FORMAT),
    (HAS_IMM, WORD_FORMAT),
    (HAS_IETH, WORD_FORMAT),
)
"""In the order they have on the wire."""


class Kind(NamedTuple):
    """One opcode.

    Attributes:
        pack: writes all its headers: buffer, offset, the words of the BTH, those of the extension headers.
    """

    known: bool
    request: bool
    read_response: bool
    header_bytes: int
    pack: Callable[..., None]


def _kind_of(opcode: int) -> Kind:
    words = "".join(words for has, words in _EXTENSIONS if has[opcode])
    headers = struct.Struct(">" + BTH_FORMAT + words)
    n_bytes = int(HEADER_BYTES[opcode])
    assert not n_bytes or headers.size == n_bytes
    known, request, read_response = (bool(table[opcode]) for table in (IS_KNOWN, IS_REQUEST, IS_READ_RESPONSE))
    return Kind(known, request, read_response, n_bytes, headers.pack_into)


KINDS = tuple(_kind_of(opcode) for opcode in range(256))
"""By opcode, whether or not a reliable connection has it."""
