"""What a modelled process gets instead of an answer. Raised inside procedures; nothing else was changed."""

from __future__ import annotations

from nopin.errors import NopinError
from nopin.mm.space import Reason


class ModelFault(NopinError):
    """A system call or an access of a modelled process failed.

    Attributes:
        reason: what a device is told whose access failed this way.
    """

    reason = Reason.NO_ACCESS


class Segv(ModelFault):
    """SIGSEGV, or EFAULT: nothing is mapped there, or not with these rights."""


class Bus(ModelFault):
    """SIGBUS: the file behind the mapping ends before that page."""


class PageLost(Bus):
    """SIGBUS: the page's only copy, on the swap medium, cannot be read any more."""

    reason = Reason.LOST


class NoMemory(ModelFault):
    """ENOMEM: no frame is free and none could be reclaimed, or no range of addresses is."""

    reason = Reason.BUSY


class OverMemlock(ModelFault):
    """The pin would exceed the process's limit of locked memory. ENOMEM in Linux, where it cannot be told apart."""


class NotSupported(ModelFault):
    """EINVAL or EOPNOTSUPP: the operation makes no sense for this mapping."""


class Killed(ModelFault):
    """The process is exiting; what it had not yet done is not done."""

    reason = Reason.OWNER_GONE
