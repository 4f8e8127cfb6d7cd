"""Laws of the transport's timers: what a code means on a given machine.

The specification gives nominal times and lets implementations wait longer. Soft-RoCE, and we, keep to the nominal
ones. Hardware that was measured does not: it waits several times as long after an RNR NAK, has a smallest
acknowledge timeout however small the code, and counts its retries in its own way. A model of such a machine runs the
same requester with other laws.

Sources: IBTA volume 1, 9.7.5.2.8 (RNR timer) and 9.9.2.1 (acknowledge timer); the Linux rxe driver for nominal waits.
"""

from __future__ import annotations

from nopin.nic.wire.aeth import RNR_CODES, rnr_ns
from nopin.units import MS_NS

ACK_UNIT_NS = 4096
"""The acknowledge timer is 4.096 us times two to the power of its code; code 0 is for ever."""

ACK_CODES = 32


class Timers:
    """The laws of one device; the default is the nominal table.

    Args:
        rnr_wait_factor: of the wait that an RNR NAK asks for.
        rnr_wait_min_ns: no such wait is shorter.
        ack_code_min: codes below it count as this one.
        ack_factor: of the acknowledge timeout.
        ack_first_factor: of the first timeout after progress, in timeouts (a timer that is already running, or checked
            only now and then).
        more_timeouts: how many more (or, negative, fewer) timeouts than retry_cnt + 1 a request has until it fails; one
            at least.
        park_bound_ns: a fault at the responder that outlasts this is told to the peer by an RNR NAK. 20 ms is well
            below the usual 67 ms acknowledge timer (code 14); 0: at once, as hardware without parking does.

    Attributes:
        rnr_ns: wait by code. ack_ns, first_ack_ns: timeout by code, None for never.
    """

    __slots__ = ("ack_ns", "first_ack_ns", "more_timeouts", "park_bound_ns", "rnr_ns")

    def __init__(
        self,
        *,
        rnr_wait_factor: float = 1.0,
        rnr_wait_min_ns: int = 0,
        ack_code_min: int = 0,
        ack_factor: float = 1.0,
        ack_first_factor: float = 1.0,
        more_timeouts: int = 0,
        park_bound_ns: int = 20 * MS_NS,
    ) -> None:
        self.rnr_ns = tuple(max(rnr_wait_min_ns, round(rnr_ns(code) * rnr_wait_factor)) for code in range(RNR_CODES))
        waits = [round((ACK_UNIT_NS << max(code, ack_code_min)) * ack_factor) for code in range(1, ACK_CODES)]
        self.ack_ns: tuple[int | None, ...] = (None, *waits)
        self.first_ack_ns: tuple[int | None, ...] = (None, *(round(wait * ack_first_factor) for wait in waits))
        self.more_timeouts = more_timeouts
        self.park_bound_ns = park_bound_ns

    def n_retries(self, retry_cnt: int) -> int:
        """Return how often a request is sent again before it fails."""
        return max(0, retry_cnt + self.more_timeouts)


NOMINAL = Timers()
"""What the specification's tables say."""
