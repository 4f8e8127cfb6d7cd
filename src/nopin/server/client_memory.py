"""The memory of one client's process, as the server reaches and watches it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable

from nopin.errors import HostLacks, UsageError
from nopin.linux.io_uring import PinnedFrames
from nopin.linux.pidfd import PidFd
from nopin.linux.proc import Maps
from nopin.linux.process_memory import ProcessMemory
from nopin.linux.uffd_handshake import LINK
from nopin.linux.userfaultfd import Userfaultfd
from nopin.mm.causes import Cause
from nopin.mm.notifier import Notifiers, Subscription
from nopin.mm.pinned import PinnedSpace
from nopin.mm.plain import PlainSpace
from nopin.mm.space import AddressSpace
from nopin.mm.subscriber import Subscriber
from nopin.ranges import Range
from nopin.server.core import Core
from nopin.server.refusal import refuse
from nopin.server.timers import Timer
from nopin.server.watch import Watcher
from nopin.units import S_NS

_REARM_NS = S_NS
"""How long after a change to watch what may be mapped there again."""


class ClientMemory:
    """The address spaces of one client: the plain one, made when first needed, and one per pinned region."""

    def __init__(self, core: Core, process: PidFd, misbehaved: Callable[[str], None]) -> None:
        """Hold nothing yet; `misbehaved` ends the client's session, for the reason given to it."""
        self._core = core
        self._process = process
        self._misbehaved = misbehaved
        self._plain: int | None = None
        self._spaces: dict[int, AddressSpace] = {}
        self._notifiers = Notifiers()
        self._watcher: Watcher | None = None
        self._maps: Maps | None = None
        self._rearm: Timer | None = None

    @property
    def watching(self) -> bool:
        """True when user actions on watched ranges are heard."""
        return self._watcher is not None

    def watch_with(self, fd: int) -> None:
        """Take the client's userfaultfd; owns it from now on.

        Raises:
            ServerRefused: it is something else.
        """
        if os.readlink(f"/proc/self/fd/{fd}") != LINK:
            os.close(fd)
            raise refuse("the descriptor beside Hello is no userfaultfd", errno.EINVAL)
        self.close_watch()
        os.set_blocking(fd, False)
        self._watcher = Watcher(Userfaultfd(fd), self._notifiers, self._mappings_within)
        self._core.poller.watch(self._watcher.fileno(), self._on_message)

    def plain_pasid(self) -> int:
        """Return the PASID of the process's own memory.

        Raises:
            ServerRefused: the kernel does not let us reach it (EPERM), or the process is gone (ESRCH).
        """
        if self._plain is None:
            self._plain = self._bind(PlainSpace(self._process_memory()))
        return self._plain

    def pin(self, ring_fd: int, address: int, length: int) -> int:
        """Return the PASID of a new address space: the frames the client registered with its io_uring.

        Args:
            ring_fd: the ring's descriptor number in the client.
            length: positive, and not beyond the end of the address space.

        Raises:
            ServerRefused: the descriptor cannot be taken, or is no such ring.
        """
        try:
            frames = PinnedFrames(self._process, ring_fd, address)
        except HostLacks as problem:
            raise refuse(str(problem), errno.EOPNOTSUPP, "host") from problem
        except UsageError as problem:
            raise refuse(f"descriptor {ring_fd} of the client: {problem}", errno.EINVAL) from problem
        except OSError as problem:
            text = f"cannot take descriptor {ring_fd} of the client: {problem.strerror}"
            raise refuse(text, problem.errno or errno.EINVAL) from problem
        return self._bind(PinnedSpace(frames, Range.of_length(address, length)))

    def unpin(self, pasid: int) -> None:
        """End a pinned address space."""
        self._unbind(pasid)

    def watch(self, where: Range, subscriber: Subscriber) -> tuple[Subscription, bool] | None:
        """Have changes of a range told.

        Returns:
            The subscription, and whether all of the range can be heard now; None where nothing can be.
        """
        if self._watcher is None:
            return None
        complete = self._watcher.watch(where)
        self._rearm_later()
        return self._notifiers.subscribe(where, subscriber), complete

    def tell(self, where: Range, cause: Cause) -> None:
        """Tell who watches that the process did something to its mappings there."""
        self._notifiers.invalidate(where, cause)

    def unwatch(self, subscription: Subscription) -> None:
        """End a watch."""
        self._notifiers.unsubscribe(subscription)
        if self._watcher is not None:
            self._watcher.unwatch(subscription.where)

    def close_watch(self) -> None:
        """Stop watching; the process goes on undisturbed. Twice is fine."""
        if self._rearm is not None:
            self._rearm.cancel()
        if self._watcher is not None:
            self._core.poller.forget(self._watcher.fileno())
            self._watcher.close()
            self._watcher = None
        if self._maps is not None:
            self._maps.close()
            self._maps = None

    def close_spaces(self) -> None:
        """Release the process's memory: tell whoever still listens, unbind every address space. Twice is fine."""
        self._notifiers.release()
        for pasid in list(self._spaces):
            self._unbind(pasid)
        self._plain = None

    def _process_memory(self) -> ProcessMemory:
        pid = self._process.pid
        try:
            return ProcessMemory(PidFd(pid, os.dup(self._process.fileno())), self._unclaimed)
        except PermissionError as problem:
            text = (
                f"the kernel does not let the server (pid {os.getpid()}) reach the memory of pid {pid}; "
                "let the client call prctl(PR_SET_PTRACER), or lower kernel.yama.ptrace_scope"
            )
            raise refuse(text, errno.EPERM) from problem
        except OSError as problem:
            raise refuse(f"cannot reach the memory of pid {pid}: {problem}", errno.ESRCH) from problem

    def _unclaimed(self, where: Range) -> bool:
        """Ask the watch whether the client's pages belong to no userfaultfd of its own."""
        return self._watcher is not None and self._watcher.unclaimed(where)

    def _bind(self, space: AddressSpace) -> int:
        pasid = self._core.iommu.bind(space)
        self._spaces[pasid] = space
        return pasid

    def _unbind(self, pasid: int) -> None:
        """Unbind now; let go of the space only once no worker is inside it."""
        space = self._spaces.pop(pasid)
        self._core.iommu.unbind(pasid)
        self._core.workers.when_idle(pasid, space.close)

    def _mappings_within(self, where: Range) -> Iterable[Range]:
        if self._maps is None:
            try:
                self._maps = Maps(self._process.pid)
            except OSError:  # gone, or out of our reach: then nothing can be watched either
                return []
        return [mapping.where for mapping in self._maps.within(where)]

    def _on_message(self, _mask: int) -> None:
        """The client did something to its mappings and waits until the message is read."""
        assert self._watcher is not None
        try:
            self._watcher.drain()
        except UsageError as problem:
            self._misbehaved(str(problem))
            return
        self._rearm_later()

    def _rearm_later(self) -> None:
        """Try to watch what could not be watched, after a while, as long as there is such."""
        if self._rearm is None and self._watcher is not None and self._watcher.needs_rearm:
            self._rearm = self._core.timers.at(self._core.clock() + _REARM_NS, self._watch_again)

    def _watch_again(self) -> None:
        self._rearm = None
        if self._watcher is not None:
            self._watcher.rearm()
            self._rearm_later()
