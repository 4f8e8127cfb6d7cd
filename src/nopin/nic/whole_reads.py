"""READ requests that follow one another, accepted as one: the steady state of batched READs at the responder.

They are checked as arrays, and stand among the replies as one run, whose responses are laid out and read together
(`answers.py`). Whatever is special about a request is left to the ordinary way (`responder.py`), which finds out.
"""

from __future__ import annotations

import numpy as np

from nopin.nic.abi import Discipline
from nopin.nic.core import Core
from nopin.nic.packets import Packets, first_true
from nopin.nic.parts import n_packets_of
from nopin.nic.qp import QueuePair, ReadRun, SavedRequest
from nopin.nic.rights import REMOTE_READ
from nopin.nic.runs import MESSAGE_PACKETS_MAX, RUN_MIN
from nopin.nic.wire.headers import parse_reth
from nopin.nic.wire.opcodes import BTH_BYTES, Opcode
from nopin.nic.wire.psn import PSN_MASK

_READ_REQUEST = int(Opcode.READ_REQUEST)


def whole_reads(core: Core, qp: QueuePair, packets: Packets) -> tuple[ReadRun | None, list[SavedRequest]]:
    """Return the READs that the packets ask for, from the first on, and what is to be kept of the last of them.

    None: there are too few, or the first is special. Requires: the first has the expected PSN.
    """
    nothing: tuple[None, list[SavedRequest]] = None, []
    other = first_true((packets.opcode != _READ_REQUEST) | (packets.payload != 0))
    n = len(packets) if other < 0 else other
    n_saved = qp.attr.max_dest_rd_atomic or 0
    if n < RUN_MIN or not n_saved or not (qp.attr.access or 0) & REMOTE_READ:
        return nothing
    reth = parse_reth(packets.staging.array, packets.offsets[:n] + BTH_BYTES)
    rkey = int(reth.rkey[0])
    region = core.regions.find(rkey, qp.pd)
    if region is None or not region.access & REMOTE_READ or region.discipline is Discipline.SHORT_TERM:
        return nothing
    good = (reth.rkey == rkey) & (reth.length > 0) & (reth.length <= MESSAGE_PACKETS_MAX * qp.mtu)
    good &= region.hold_each(reth.address, reth.length)
    ends = np.cumsum(n_packets_of(reth.length, qp.mtu))
    psn = int(packets.psn[0])
    good[1:] &= packets.psn[1:n] == ((ends[:-1] + psn) & PSN_MASK)
    bad = first_true(~good)
    n = n if bad < 0 else bad
    if n < RUN_MIN:
        return nothing
    run = ReadRun(psn, rkey, reth.address[:n], reth.length[:n], ends[:n], qp.mtu, qp.recv.msn + 1, region)
    return run, [SavedRequest(s.psn, s.n_left, rkey, s.address, s.left) for s in run.streams(max(0, n - n_saved))]
