"""Attaching to a share."""

from __future__ import annotations

from nopin.control.url import ShareUrl
from nopin.errors import UsageError
from nopin.pending import checked_timeout
from nopin.verbs.attachment import Attachment
from nopin.verbs.device import Device, default_device
from nopin.verbs.lifeline import RECONNECT_S, patience
from nopin.verbs.remote import RemoteArray


def attach(
    url: str, *, device: Device | None = None, timeout: float = 5.0, reconnect: float | None = RECONNECT_S
) -> RemoteArray:
    """Attach to memory that another process shares.

    Args:
        url: the owner's `Share.url`.
        device: through which to reach it; None for this process's default device.
        timeout: seconds for the set-up.
        reconnect: seconds to try to attach again when the connection breaks, as it does when a device server is killed;
            None for ever, 0 for not at all.

    Raises:
        UsageError: the text is no share URL, or the timeout no time.
        AttachRefused: no such share, wrong token, or no room there.
        PeerError: nobody answers, or not as the owner's server would.
        ServerError: our own device server cannot be used.
    """
    if not isinstance(url, str):  # the commonest wrong moves are the share itself, and None
        raise UsageError(f"a share is attached to by its URL, a text such as share.url, not by {type(url).__name__}")
    timeout_s = checked_timeout(timeout)
    if not timeout_s:
        raise UsageError(f"timeout={timeout!r}: give seconds above 0, and an end")
    parsed = ShareUrl.parse(url)
    device = device or default_device()
    return RemoteArray(device, Attachment(device, parsed, timeout_s, patience(reconnect)))
