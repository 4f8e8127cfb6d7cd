"""The pipe by which a server tells who started it that clients can connect, or which feature the host lacks for it."""

from __future__ import annotations

import contextlib
import os

import msgspec

from nopin.errors import HostLacks

_READY = b"\n"
_WORDS_BYTES_MAX = 4096
"""PIPE_BUF: one write arrives whole."""


class _Lacking(msgspec.Struct):
    feature: str
    reason: str
    remedy: str


def tell_ready(fd: int) -> None:
    """Say that clients can connect, and close the pipe."""
    _tell(fd, _READY)


def tell_lacking(fd: int, lacking: HostLacks) -> None:
    """Say what the host lacks, and close the pipe."""
    _tell(fd, msgspec.json.encode(_Lacking(lacking.feature, lacking.reason, lacking.remedy)))


def heard_ready(fd: int) -> bool:
    """Read what the server said; False if it ended without a word. Waits.

    Raises:
        HostLacks: the server ended for want of a feature.
    """
    words = os.read(fd, _WORDS_BYTES_MAX)
    if words in (b"", _READY):
        return bool(words)
    told = msgspec.json.decode(words, type=_Lacking)
    raise HostLacks(told.feature, told.reason, told.remedy)


def _tell(fd: int, words: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # who started us did not wait
        os.write(fd, words)
    os.close(fd)
