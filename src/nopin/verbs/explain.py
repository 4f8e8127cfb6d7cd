"""Completion errors in words: what happened, where, and what to do."""

from __future__ import annotations

from nopin.errors import WorkError
from nopin.nic.abi import WcStatus

_HINTS = {
    WcStatus.LOC_PROT_ERR: "memory of this process named in the request is not mapped, or not with that right",
    WcStatus.LOC_LEN_ERR: "the message is longer than its receive buffer, or than 2 GiB",
    WcStatus.LOC_QP_OP_ERR: "the request makes no sense to the queue pair",
    WcStatus.WR_FLUSH_ERR: "an earlier request on this connection failed; attach again",
    WcStatus.REM_ACCESS_ERR: (
        "the owner unmapped, protected or withdrew this memory, cut the file below it, or does not grant this access; "
        "or it is managed memory, and a page is lost, or its budget is smaller than one step of a transfer "
        "(up to 4 MiB)"
    ),
    WcStatus.REM_INV_REQ_ERR: "the peer refuses such a request; atomics need an address that is a multiple of 8",
    WcStatus.REM_OP_ERR: "the peer could not carry it out",
    WcStatus.RETRY_EXC_ERR: "the peer does not answer: its server ended, or the network is cut",
    WcStatus.RNR_RETRY_EXC_ERR: "the peer was not ready for too long",
}


def work_error(status: int, what: str) -> WorkError:
    """Make the error for a failed request.

    Args:
        status: a WcStatus.
        what: the operation and its remote range.
    """
    known = WcStatus(status)
    hint = _HINTS.get(known, "see ibv_wc_status for its meaning")
    return WorkError(f"{what}: {known.name}: {hint}", status=status)
