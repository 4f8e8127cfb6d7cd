"""What the NIC counts. Names follow the rxe driver's hardware counters where one exists."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class Counters:
    """Counts since the device started."""

    sent_pkts: int = 0
    rcvd_pkts: int = 0
    sent_bytes: int = 0
    rcvd_bytes: int = 0
    malformed_drop: int = 0
    """Too short, wrong version or transport, bad P_Key."""
    icrc_drop: int = 0
    unknown_qpn_drop: int = 0
    wrong_state_drop: int = 0
    wrong_path_drop: int = 0
    """Source or destination address not that of the queue pair."""
    duplicate_request: int = 0
    duplicate_drop: int = 0
    """A duplicate READ or atomic that no saved request explains."""
    out_of_seq_request: int = 0
    dropped_after_nak: int = 0
    ghost_response: int = 0
    """A response that acknowledges nothing outstanding."""
    out_of_seq_response: int = 0
    sent_nak: int = 0
    rcvd_nak: int = 0
    sent_rnr_nak: int = 0
    rcvd_rnr_nak: int = 0
    ack_timeout: int = 0
    resent_pkts: int = 0
    retry_exceeded: int = 0
    rnr_retry_exceeded: int = 0
    access_error: int = 0
    bad_key: int = 0
    local_protection_error: int = 0
    parked: int = 0
    parked_drop: int = 0
    """Packets dropped because a parked queue pair held too many already."""
    unsent_drop: int = 0
    """Requests dropped because too many answers to earlier ones still wait to be sent."""
    direct_messages: int = 0
    direct_bytes: int = 0
    cq_overrun: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return every count by name."""
        return asdict(self)
