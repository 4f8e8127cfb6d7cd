"""Every error nopin raises, in one tree.

A message says what happened, to which object, and what to do next. Errors divide by whose doing it was:
you (`UsageError`), this host (`HostLacks`), the server or its link to us (`ServerError`), the peer
(`PeerError`), or one piece of work (`WorkError`).
"""

from __future__ import annotations

import errno
from typing import Any

_REMEDIES = {
    errno.EMFILE: "raise the limit on open files of the process (ulimit -n)",
    errno.ENFILE: "raise the limit on open files of the host (sysctl fs.file-max)",
    errno.ENOMEM: "free some, or raise the limit on memory",
}


def words_of(problem: OSError) -> str:
    """Say what an error of the system is, without its number, and what to do where that is clear."""
    reason, remedy = problem.strerror or str(problem), _REMEDIES.get(problem.errno or 0)
    return f"{reason}; {remedy}" if remedy else reason


class NopinError(Exception):
    """Base of every error raised by nopin. All can be pickled, as `multiprocessing` does with what a worker raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[NopinError], args: tuple[object, ...], attributes: dict[str, object]) -> NopinError:
    """Make an error once more: from what it has, since not every one can be made of its message alone."""
    layout = OSError if issubclass(kind, OSError) else Exception  # whose memory has the form of this one's
    error = layout.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class UsageError(NopinError, ValueError):
    """The caller asked for something that has no meaning; nothing was changed."""


class HostLacks(NopinError):
    """This host does not allow a feature.

    Attributes:
        feature: the short name `nopin doctor` prints.
        remedy: one sentence that says what would allow it.
    """

    def __init__(self, feature: str, reason: str, remedy: str) -> None:
        super().__init__(f"{feature}: {reason}; {remedy}")
        self.feature = feature
        self.reason = reason
        self.remedy = remedy


class ServerError(NopinError):
    """The device server could not be reached, refused, or went away."""


class ServerGone(ServerError, ConnectionError):
    """The connection to the device server broke; every object of this device is dead."""


class ServerRefused(ServerError):
    """The device server refused one request; nothing was changed.

    Attributes:
        code: short machine-readable reason: ``"host"`` (it lacks a feature), ``"limit"``, ``"memlock"``, or the errno's
            name in small letters.
        errno: the errno a verbs provider would return.
    """

    def __init__(self, message: str, *, code: str, errno: int) -> None:
        super().__init__(message)
        self.code = code
        self.errno = errno


class PeerError(NopinError):
    """The other end of a connection refused or vanished."""


class AttachRefused(PeerError):
    """The peer's server refused an attach request.

    Attributes:
        code: ``"token"``, ``"region"``, ``"malformed"``, ``"limit"`` or ``"version"``.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code


class RegionGone(PeerError):
    """The shared region no longer exists: withdrawn by its owner, or the owner ended."""


class OwnerGone(NopinError):
    """The process whose memory was to be accessed has exited."""


class WorkError(NopinError):
    """A work request completed with an error status.

    Attributes:
        status: the `WcStatus` of the completion.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class AcceleratorError(NopinError):
    """A job on an accelerator failed.

    Attributes:
        exception: name of the type of what the kernel raised; empty when it was not the kernel's doing.
        traceback: where in the kernel, as text; empty for kernels written in C.
    """

    def __init__(self, message: str, *, exception: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.exception = exception
        self.traceback = traceback


class WorkerGone(AcceleratorError):
    """The worker process of a job died in it; what the job had written until then stays.

    Attributes:
        exit_status: of the process; -n when signal n killed it.
    """

    def __init__(self, message: str, *, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class PageLost(WorkerGone):
    """The worker touched a page of an arena whose bytes are lost."""


class JobCancelled(NopinError):
    """A job was cancelled by its owner."""


class ArenaFull(NopinError, MemoryError):
    """An arena has no room left for an array; nothing was changed."""


class PrefetchFailed(NopinError):
    """A prefetch ended before all its bytes were resident.

    Attributes:
        reason: short machine-readable reason (``"lost"``, ``"swap_full"``, ``"no_room"``, ...).
        bytes_done: made resident before, whole pages.
    """

    def __init__(self, message: str, *, reason: str, bytes_done: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.bytes_done = bytes_done


class QueueFull(NopinError):
    """The send or receive queue has no free entry; poll completions and post again (ENOMEM in verbs)."""


class Closed(NopinError):
    """The object was closed by its owner, or belongs to the process this one was forked from."""
